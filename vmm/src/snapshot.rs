//! The saved state of a machine as bytes, and back.
//!
//! ```text
//!   8 bytes  "STERNAVM"        all numbers little-endian
//!   4 bytes  version           changes whenever the payload's form does; no other version is read
//!   4 bytes  kind              0 KVM, 1 synthetic
//!   8 bytes  payload length    exact: nothing may follow
//!   8 bytes  FNV-1a of the payload, against accidents and not against attackers
//!   payload  postcard
//! ```

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{MachineConfig, MachineKind, Workload};
use crate::error::MachineError;

/// No state is larger: 64 vCPUs come to about 2 MiB.
pub const MAX_STATE_BYTES: usize = 8 << 20;

const MAGIC: [u8; 8] = *b"STERNAVM";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 32;

/// The saved state of every machine, with the part of its kind.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Snapshot<S> {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) workload: Workload,
    /// The count of beats of each vCPU.
    pub(crate) beats: Vec<u64>,
    pub(crate) engine: S,
}

impl<S> Snapshot<S> {
    /// Whether this is the state of a machine of this configuration.
    pub(crate) fn check_fits(&self, config: &MachineConfig) -> Result<(), MachineError> {
        let differs = |what, in_state: &dyn ToString, in_machine: &dyn ToString| {
            let (in_state, in_machine) = (in_state.to_string(), in_machine.to_string());
            Err(MachineError::StateMismatch { what, in_state, in_machine })
        };
        if self.vcpus != config.vcpus {
            return differs("the number of vCPUs", &self.vcpus, &config.vcpus);
        }
        if self.memory_bytes != config.memory_bytes {
            return differs("the RAM size in bytes", &self.memory_bytes, &config.memory_bytes);
        }
        let (ours, theirs) = (&config.workload, &self.workload);
        if theirs.working_set_bytes != ours.working_set_bytes {
            return differs("the working set in bytes", &theirs.working_set_bytes, &ours.working_set_bytes);
        }
        if theirs.rate_mb_per_s != ours.rate_mb_per_s {
            return differs("the rate in MB/s", &theirs.rate_mb_per_s, &ours.rate_mb_per_s);
        }
        if self.beats.len() != usize::from(config.vcpus) {
            return Err(invalid(format!("it has the beats of {} vCPUs", self.beats.len())));
        }
        Ok(())
    }
}

pub(crate) fn encode<S: Serialize>(
    kind: MachineKind,
    snapshot: &Snapshot<S>,
) -> Result<Vec<u8>, MachineError> {
    let payload = postcard::to_stdvec(snapshot).map_err(|error| invalid(error.to_string()))?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(kind_number(kind).to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(fnv1a(&payload).to_le_bytes());
    bytes.extend(payload);
    if bytes.len() > MAX_STATE_BYTES {
        return Err(invalid(format!("it is larger than {MAX_STATE_BYTES} bytes")));
    }
    Ok(bytes)
}

pub(crate) fn decode<S: DeserializeOwned>(
    kind: MachineKind,
    bytes: &[u8],
) -> Result<Snapshot<S>, MachineError> {
    if bytes.len() > MAX_STATE_BYTES {
        return Err(invalid(format!("it is larger than {MAX_STATE_BYTES} bytes")));
    }
    let Some((header, payload)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(invalid(format!("it has {} bytes, and its header alone {HEADER_BYTES}", bytes.len())));
    };
    if header[..8] != MAGIC {
        return Err(invalid("it does not begin with STERNAVM".to_owned()));
    }
    let version = number(&header[8..12]);
    if version != u64::from(VERSION) {
        return Err(invalid(format!("it has version {version}, and this program reads version {VERSION}")));
    }
    if number(&header[12..16]) != u64::from(kind_number(kind)) {
        return Err(invalid(format!("it is not of a {kind:?} machine")));
    }
    let len_bytes = number(&header[16..24]);
    if len_bytes != payload.len() as u64 {
        return Err(invalid(format!("it should have {len_bytes} bytes and has {}", payload.len())));
    }
    if number(&header[24..32]) != fnv1a(payload) {
        return Err(invalid("its checksum is wrong".to_owned()));
    }
    match postcard::take_from_bytes(payload) {
        Ok((snapshot, [])) => Ok(snapshot),
        Ok((_, rest)) => Err(invalid(format!("{} bytes are left over", rest.len()))),
        Err(error) => Err(invalid(error.to_string())),
    }
}

pub(crate) fn invalid(reason: String) -> MachineError {
    MachineError::State { reason }
}

fn kind_number(kind: MachineKind) -> u32 {
    match kind {
        MachineKind::Kvm => 0,
        MachineKind::Synthetic => 1,
    }
}

/// At most eight bytes as a little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| (number << 8) | u64::from(byte))
}

/// The 64-bit hash of Fowler, Noll and Vo, variant 1a.
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot<Vec<u32>> {
        let workload = Workload { working_set_bytes: 8192, rate_mb_per_s: 3, prefill: true, sweepers: 0 };
        Snapshot { memory_bytes: 16 << 20, vcpus: 2, workload, beats: vec![5, 6], engine: vec![1, 2, 3] }
    }

    fn decode_it(bytes: &[u8]) -> Result<Snapshot<Vec<u32>>, MachineError> {
        decode(MachineKind::Kvm, bytes)
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let bytes = encode(MachineKind::Kvm, &snapshot()).unwrap();
        let read = decode_it(&bytes).unwrap();
        assert_eq!(format!("{read:?}"), format!("{:?}", snapshot()));
    }

    #[test]
    fn no_damaged_state_is_read() {
        let bytes = encode(MachineKind::Kvm, &snapshot()).unwrap();
        for len in 0..bytes.len() {
            assert!(decode_it(&bytes[..len]).is_err(), "cut to {len} bytes");
        }
        for index in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[index] ^= 0x10;
            assert!(decode_it(&bytes).is_err(), "byte {index} changed");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode_it(&longer).is_err());
        assert!(decode_it(&vec![0; MAX_STATE_BYTES + 1]).is_err());
        assert!(decode::<Vec<u32>>(MachineKind::Synthetic, &bytes).is_err());
    }

    #[test]
    fn bytes_left_over_within_the_payload_are_refused() {
        let mut bytes = encode(MachineKind::Kvm, &snapshot()).unwrap();
        bytes.push(0);
        let payload = bytes[HEADER_BYTES..].to_vec();
        bytes[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&fnv1a(&payload).to_le_bytes());
        assert!(decode_it(&bytes).unwrap_err().to_string().contains("left over"));
    }
}

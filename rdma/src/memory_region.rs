//! Registered memory.

use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::protection_domain::ProtectionDomain;
use crate::sys::Mapping;
use crate::sys::constants::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE};
use crate::sys::os;
use crate::sys::region::Region;

/// What a device may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read for local writes: the source of a migration. The peer has no access.
    LocalRead,
    /// Read, and written with the data of local reads. The peer has no access.
    LocalWrite,
    /// Like [`LocalWrite`](Self::LocalWrite), and the peer may write: the destination of a migration.
    RemoteWrite,
    /// Read, and the peer may read: the source of a post-copy migration.
    RemoteRead,
}

impl Access {
    fn flags(self) -> c_int {
        match self {
            Access::LocalRead => 0,
            Access::LocalWrite => IBV_ACCESS_LOCAL_WRITE,
            Access::RemoteWrite => IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE,
            Access::RemoteRead => IBV_ACCESS_REMOTE_READ,
        }
    }

    /// Whether local reads may put their data into the region.
    pub fn allows_local_write(self) -> bool {
        matches!(self, Access::LocalWrite | Access::RemoteWrite)
    }
}

/// A piece of a mapping, pinned and registered with the device.
///
/// The region holds its mapping. Every queue pair that posted from the region holds it until the queue pair
/// is destroyed or has [released](crate::QueuePair::release) it. So the region is deregistered after the last
/// of its queue pairs, and the memory is unmapped after that. Dropping a region to which a peer writes ends
/// the peer's access.
#[derive(Debug)]
pub struct MemoryRegion {
    region: Arc<Region>,
    access: Access,
    domain: Arc<ProtectionDomain>,
}

impl MemoryRegion {
    /// Registers `len_bytes` bytes of `mapping` from byte `offset_bytes` on. The call pins the memory, which
    /// counts against RLIMIT_MEMLOCK, and takes time in proportion to its length.
    ///
    /// # Errors
    /// [`Error::RegionOutOfRange`] when the piece is empty or leaves the mapping, [`Error::Pin`] when the
    /// memory cannot be pinned, [`Error::OverLimit`] when it is longer than the device's largest region,
    /// [`Error::Call`] for the rest.
    pub fn register(
        domain: &Arc<ProtectionDomain>,
        mapping: Arc<dyn Mapping>,
        offset_bytes: usize,
        len_bytes: usize,
        access: Access,
    ) -> Result<Arc<MemoryRegion>, Error> {
        let mapping_len_bytes = mapping.len_bytes();
        let inside = offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= mapping_len_bytes);
        if !inside || len_bytes == 0 {
            return Err(Error::RegionOutOfRange { offset_bytes, len_bytes, mapping_len_bytes });
        }
        let limit = domain.device().limits().memory_region_bytes;
        if len_bytes as u64 > limit {
            return Err(Error::OverLimit {
                what: "bytes in one memory region",
                asked: len_bytes as u64,
                limit,
            });
        }
        let region = Region::register(domain.domain(), mapping, offset_bytes, len_bytes, access.flags());
        let region = region.map_err(|source| match source.raw_os_error() {
            // The kernel returns EPERM when the limit is zero.
            Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
                Error::Pin { len_bytes, memlock_limit_bytes: os::memlock_limit_bytes(), source }
            }
            _ => Error::Call { call: "ibv_reg_mr", source },
        })?;
        Ok(Arc::new(MemoryRegion { region: Arc::new(region), access, domain: Arc::clone(domain) }))
    }

    /// Deregisters the region, as dropping its last handle does, for a caller that needs to know that it
    /// worked. After success the region's keys are invalid.
    ///
    /// # Errors
    /// [`Error::RegionInUse`] while another handle or a queue pair holds the region, [`Error::Call`] when the
    /// device refuses; the peer may then still have access.
    pub fn deregister(region: Arc<MemoryRegion>) -> Result<(), Error> {
        let region = Arc::into_inner(region).and_then(|region| Arc::into_inner(region.region));
        region.ok_or(Error::RegionInUse)?.deregister()
    }

    /// The region's start, as the peer addresses it together with [`remote_key`](Self::remote_key).
    pub fn address(&self) -> u64 {
        self.region.address()
    }

    /// The region's length.
    pub fn len_bytes(&self) -> usize {
        self.region.len_bytes()
    }

    /// What the device may do with the region.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The key that gives a peer access, within the region's [`Access`].
    pub fn remote_key(&self) -> RemoteKey {
        RemoteKey(self.region.remote_key())
    }

    /// The protection domain it is registered in.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

/// The key to one of the peer's regions. A process that has the key and reaches the queue pair can write to
/// the region's memory, so the key travels over the control channel alone and `Debug` output hides it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RemoteKey(pub(crate) u32);

impl RemoteKey {
    /// A key received in another encoding than [`serde`]'s.
    pub fn from_raw(raw: u32) -> RemoteKey {
        RemoteKey(raw)
    }

    /// The number, for another encoding than [`serde`]'s.
    pub fn to_raw(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RemoteKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_key_does_not_show_in_logs() {
        let text = format!("{:?}", RemoteKey(0xdead));
        assert!(!text.contains("57005") && !text.contains("dead"), "{text}");
    }

    #[test]
    fn a_source_region_lets_nobody_in() {
        assert_eq!(Access::LocalRead.flags(), 0);
        assert_eq!(Access::LocalWrite.flags() & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ), 0);
    }

    /// The kernel refuses remote write without local write.
    #[test]
    fn remote_write_brings_local_write() {
        assert_eq!(Access::RemoteWrite.flags(), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    }
}

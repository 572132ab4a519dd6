use std::fmt;
use std::sync::Arc;

use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use super::chunks::CHUNK_BYTES_MIN;
use super::wire::ChunkRange;
use crate::host::{self, Memlock};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};

use crate::transport::error::TransportError;

/// Below this, registering RAM in turn costs more than RDMA gains over TCP: RDMA is chosen only if asked for
/// by name.
const WORTHWHILE_BYTES: u64 = 64 << 20;

/// An eighth of the available memory is left to other processes, but at most this much.
const RESERVE_MAX_BYTES: u64 = 4 << 30;

/// The memory that the queues of one lane may take for this many requests: some devices pin it too, against
/// the same limit. Counts 128 bytes of a request in a send queue and as much for its completion, which is
/// more than devices need; and whole pages for the queues and for their doorbells.
pub(super) fn queue_bytes(requests: u32) -> u64 {
    u64::from(requests).next_multiple_of(16) * 256 + 4 * PAGE_BYTES
}

/// How much RAM may be registered at once, if not everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Budget {
    pub(super) bytes: u64,
    /// The origin of the limit.
    pub(super) limit: PinLimit,
}

impl Budget {
    /// The destination's limit.
    pub(super) fn of_destination(bytes: u64) -> Self {
        Self { bytes, limit: PinLimit::Destination }
    }
}

/// The origin of a limit on pinned memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PinLimit {
    Asked,
    Locked,
    Available,
    Destination,
}

impl fmt::Display for PinLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Asked => "the limit that was asked for",
            Self::Locked => "the limit on locked memory",
            Self::Available => "the memory that is available here",
            Self::Destination => "what the destination may pin",
        })
    }
}

/// How much of `ram` may be registered at once at this end beside `lanes` lanes of this many requests; `None`
/// if everything may.
///
/// # Errors
/// [`TransportError::LockedMemory`] or [`TransportError::ScarceMemory`] if that is too little to move a
/// guest, or, unless RDMA was asked for `by_name`, too little to be useful.
pub(super) fn pin_budget(
    ram: &GuestRam,
    pin_max_bytes: Option<u64>,
    (lanes, requests): (usize, u32),
    by_name: bool,
) -> Result<Option<Budget>, TransportError> {
    let least = if by_name { CHUNK_BYTES_MIN } else { WORTHWHILE_BYTES };
    let queues_bytes = lanes as u64 * queue_bytes(requests);
    let host = Host {
        memlock: host::memlock(),
        queues_bytes,
        available_bytes: host::available_memory_bytes(),
        resident_bytes: host::resident_memory_bytes(),
        huge_bytes: huge_bytes(ram),
    };
    host.budget(ram.layout().total_bytes(), pin_max_bytes, least)
}

/// How much RAM is in the pool of huge pages.
fn huge_bytes(ram: &GuestRam) -> u64 {
    let huge = ram.regions().iter().filter(|region| region.is_of_huge_pages());
    huge.map(|region| region.layout().len_bytes).sum()
}

/// The host's limits on pinned memory.
#[derive(Clone, Copy, Debug, Default)]
struct Host {
    memlock: Memlock,
    /// The queues' share of the memory that may be locked.
    queues_bytes: u64,
    /// The memory still available, if known.
    available_bytes: Option<u64>,
    /// The memory that this process has already.
    resident_bytes: u64,
    /// RAM in huge pages, which takes no such memory.
    huge_bytes: u64,
}

impl Host {
    fn budget(
        &self,
        ram_bytes: u64,
        pin_max_bytes: Option<u64>,
        least_bytes: u64,
    ) -> Result<Option<Budget>, TransportError> {
        let of = |limit| move |bytes| Budget { bytes, limit };
        let limits = [
            pin_max_bytes.map(of(PinLimit::Asked)),
            self.lockable_bytes(ram_bytes).map(of(PinLimit::Locked)),
            self.fitting_bytes().map(of(PinLimit::Available)),
        ];
        let lowest = limits.into_iter().flatten().min_by_key(|budget| (budget.bytes, budget.limit));
        match lowest.filter(|budget| budget.bytes < ram_bytes) {
            Some(Budget { bytes, limit }) if bytes < least_bytes => Err(match limit {
                PinLimit::Available => {
                    TransportError::ScarceMemory { needed_bytes: least_bytes, available_bytes: bytes }
                }
                _ => TransportError::LockedMemory { needed_bytes: least_bytes, limit_bytes: bytes },
            }),
            budget => Ok(budget),
        }
    }

    /// How much may be locked; `None` if all of RAM may.
    fn lockable_bytes(&self, ram_bytes: u64) -> Option<u64> {
        let all_bytes = ram_bytes.saturating_add(self.queues_bytes);
        let limit_bytes = self.memlock.limit_bytes.filter(|_| !self.memlock.allows(all_bytes))?;
        Some(limit_bytes.saturating_sub(self.queues_bytes))
    }

    /// How much this host has room for. Pinning memory that this process already has takes no available
    /// memory, and huge pages do not count. All memory of the process counts as the guest's, because the rest
    /// is negligible.
    fn fitting_bytes(&self) -> Option<u64> {
        let available_bytes = self.available_bytes?;
        let reserve_bytes = (available_bytes / 8).min(RESERVE_MAX_BYTES);
        Some(
            (available_bytes - reserve_bytes)
                .saturating_add(self.resident_bytes)
                .saturating_add(self.huge_bytes),
        )
    }
}

/// Registers a chunk of guest RAM.
pub(super) fn register(
    domain: &Arc<ProtectionDomain>,
    ram: &GuestRam,
    range: ChunkRange,
    access: Access,
) -> Result<Arc<MemoryRegion>, TransportError> {
    let outside = || {
        let ChunkRange { region, first_page, pages } = range;
        MemoryError::OutOfRange { region: region.into(), first_page, pages }
    };
    let region = ram.regions().get(usize::from(range.region)).ok_or_else(outside)?;
    let offset = range.first_page.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
    let len = range.pages.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
    let (offset, len) = offset.zip(len).ok_or_else(outside)?;
    Ok(MemoryRegion::register(domain, Arc::new(region.clone()), offset, len, access)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limited(limit: u64) -> Memlock {
        Memlock { limit_bytes: Some(limit), may_exceed: false }
    }

    fn locked(memlock: Memlock, queues_bytes: u64) -> Host {
        Host { memlock, queues_bytes, ..Host::default() }
    }

    fn is(limit: PinLimit, mib: u64) -> Option<Budget> {
        Some(Budget { bytes: mib * MIB, limit })
    }

    #[test]
    fn without_a_limit_that_matters_all_of_ram_is_registered() {
        let free = locked(Memlock { limit_bytes: Some(MIB), may_exceed: true }, 8 * MIB);
        assert_eq!(free.budget(1024 * MIB, None, MIB).unwrap(), None);
        assert_eq!(locked(Memlock::default(), 8 * MIB).budget(1024 * MIB, None, MIB).unwrap(), None);
        assert_eq!(locked(limited(1032 * MIB), 8 * MIB).budget(1024 * MIB, None, MIB).unwrap(), None);
        assert_eq!(free.budget(1024 * MIB, Some(1024 * MIB), MIB).unwrap(), None);
        let ample = Host { available_bytes: Some(2048 * MIB), ..Host::default() };
        assert_eq!(ample.budget(1024 * MIB, None, MIB).unwrap(), None);
    }

    #[test]
    fn the_lesser_limit_counts() {
        let limited = locked(limited(64 * MIB), 8 * MIB);
        let budget = |host: Host, asked_mib: Option<u64>| {
            host.budget(1024 * MIB, asked_mib.map(|mib| mib * MIB), MIB).unwrap()
        };
        assert_eq!(budget(limited, None), is(PinLimit::Locked, 56));
        assert_eq!(budget(limited, Some(8)), is(PinLimit::Asked, 8));
        assert_eq!(budget(limited, Some(80)), is(PinLimit::Locked, 56));
        let scarce = Host { available_bytes: Some(48 * MIB), ..limited };
        assert_eq!(budget(scarce, None), is(PinLimit::Available, 42));
        assert_eq!(budget(scarce, Some(40)), is(PinLimit::Asked, 40));
    }

    #[test]
    fn of_what_is_available_a_part_is_left_to_others() {
        let fits = |available_mib: u64| {
            let host = Host { available_bytes: Some(available_mib * MIB), ..Host::default() };
            host.budget(1 << 50, None, 0).unwrap()
        };
        assert_eq!(fits(800), is(PinLimit::Available, 700));
        assert_eq!(fits(1 << 20), is(PinLimit::Available, (1 << 20) - 4096));
    }

    #[test]
    fn memory_that_the_guest_has_or_that_is_of_huge_pages_takes_nothing_that_is_available() {
        let scarce = Host { available_bytes: Some(80 * MIB), ..Host::default() };
        assert_eq!(scarce.budget(1024 * MIB, None, MIB).unwrap(), is(PinLimit::Available, 70));
        let running = Host { resident_bytes: 954 * MIB, ..scarce };
        assert_eq!(running.budget(1024 * MIB, None, MIB).unwrap(), None);
        let partly = Host { resident_bytes: 500 * MIB, ..scarce };
        assert_eq!(partly.budget(1024 * MIB, None, MIB).unwrap(), is(PinLimit::Available, 570));
        let huge = Host { huge_bytes: 1024 * MIB, ..scarce };
        assert_eq!(huge.budget(1024 * MIB, None, MIB).unwrap(), None);
        let half_huge = Host { huge_bytes: 512 * MIB, ..scarce };
        assert_eq!(half_huge.budget(1024 * MIB, None, MIB).unwrap(), is(PinLimit::Available, 582));
    }

    #[test]
    fn what_the_queues_take_grows_with_the_lanes_and_is_no_guest_memory() {
        let of = |lanes: u64| {
            let host = locked(limited(64 * MIB), lanes * queue_bytes(1024));
            host.budget(64 * MIB, None, MIB).unwrap().map(|budget| budget.bytes)
        };
        let [few, many] = [of(1), of(64)].map(Option::unwrap);
        assert!(few < 64 * MIB, "a guest that just fits would not");
        assert!(many < few - 16 * MIB, "{few} {many}");
        let more_than_all = locked(limited(2 * MIB), 3 * MIB);
        assert!(matches!(
            more_than_all.budget(64 * MIB, None, MIB),
            Err(TransportError::LockedMemory { limit_bytes: 0, .. })
        ));
    }

    #[test]
    fn too_little_is_refused_unless_the_guest_is_as_small() {
        let limited = locked(limited(8 * MIB), MIB);
        let refused = limited.budget(1024 * MIB, None, 64 * MIB);
        assert!(matches!(refused, Err(TransportError::LockedMemory { .. })));
        assert_eq!(limited.budget(7 * MIB, None, 64 * MIB).unwrap(), None);
        let scarce = Host { available_bytes: Some(8 * MIB), ..Host::default() };
        let refused = scarce.budget(1024 * MIB, None, 64 * MIB);
        let Err(TransportError::ScarceMemory { available_bytes, .. }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(available_bytes, 7 * MIB);
    }
}

use std::sync::Arc;

use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use super::slices::SLICE_BYTES_MIN;
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::preflight::{self, Memlock};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Below this, registering RAM in turn costs more than RDMA gains over TCP: RDMA is not chosen unless asked for by name.
const WORTHWHILE_BYTES: u64 = 64 << 20;

/// How much memory the queues of one lane may take up, for so many requests: some devices have them pinned too, against the same
/// limit. Of a request 128 bytes in a send queue and as much for its completion, which are more than devices need; and whole
/// pages, of the queues and of their doorbells.
pub(super) fn queue_bytes(requests: u32) -> u64 {
    u64::from(requests).next_multiple_of(16) * 256 + 4 * PAGE_BYTES
}

/// How much of `ram` may be registered at once at this end beside `lanes` lanes of so many requests; `None` if all of it may.
///
/// # Errors
/// [`TransportError::LockedMemory`] if that is too little to move a guest, or, unless RDMA was asked for `by_name`, too
/// little to be worth it.
pub(super) fn pin_budget(
    ram: &GuestRam,
    pin_max_bytes: Option<u64>,
    (lanes, requests): (usize, u32),
    by_name: bool,
) -> Result<Option<u64>, TransportError> {
    let least = if by_name { SLICE_BYTES_MIN } else { WORTHWHILE_BYTES };
    let queues_bytes = lanes as u64 * queue_bytes(requests);
    budget(ram.layout().total_bytes(), pin_max_bytes, (preflight::memlock(), queues_bytes), least)
}

fn budget(
    ram_bytes: u64,
    pin_max_bytes: Option<u64>,
    (memlock, queues_bytes): (Memlock, u64),
    least_bytes: u64,
) -> Result<Option<u64>, TransportError> {
    let bound = memlock.limit_bytes.filter(|_| !memlock.allows(ram_bytes.saturating_add(queues_bytes)));
    let lockable = bound.map(|limit| limit.saturating_sub(queues_bytes));
    let limit = [pin_max_bytes, lockable].into_iter().flatten().min();
    match limit.filter(|&limit| limit < ram_bytes) {
        Some(limit_bytes) if limit_bytes < least_bytes => {
            Err(TransportError::LockedMemory { needed_bytes: least_bytes, limit_bytes })
        }
        budget => Ok(budget),
    }
}

/// Registers a slice of guest RAM.
pub(super) fn register(
    domain: &Arc<ProtectionDomain>,
    ram: &GuestRam,
    range: SliceRange,
    access: Access,
) -> Result<Arc<MemoryRegion>, TransportError> {
    let outside = || {
        let SliceRange { region, first_page, pages } = range;
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

    #[test]
    fn without_a_limit_that_matters_all_of_ram_is_registered() {
        let free = (Memlock { limit_bytes: Some(MIB), may_exceed: true }, 8 * MIB);
        assert_eq!(budget(1024 * MIB, None, free, MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, None, (Memlock::default(), 8 * MIB), MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, None, (limited(1032 * MIB), 8 * MIB), MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, Some(1024 * MIB), free, MIB).unwrap(), None);
    }

    #[test]
    fn the_lesser_limit_counts() {
        let limited = (limited(64 * MIB), 8 * MIB);
        assert_eq!(budget(1024 * MIB, None, limited, MIB).unwrap(), Some(56 * MIB));
        assert_eq!(budget(1024 * MIB, Some(8 * MIB), limited, MIB).unwrap(), Some(8 * MIB));
        assert_eq!(budget(1024 * MIB, Some(80 * MIB), limited, MIB).unwrap(), Some(56 * MIB));
    }

    #[test]
    fn what_the_queues_take_grows_with_the_lanes_and_is_no_guest_memory() {
        let of =
            |lanes: u64| budget(64 * MIB, None, (limited(64 * MIB), lanes * queue_bytes(1024)), MIB).unwrap();
        let [few, many] = [of(1), of(64)].map(Option::unwrap);
        assert!(few < 64 * MIB, "a guest that just fits would not");
        assert!(many < few - 16 * MIB, "{few} {many}");
        let more_than_all = (limited(2 * MIB), 3 * MIB);
        assert!(matches!(
            budget(64 * MIB, None, more_than_all, MIB),
            Err(TransportError::LockedMemory { limit_bytes: 0, .. })
        ));
    }

    #[test]
    fn too_little_is_refused_unless_the_guest_is_as_small() {
        let limited = (limited(8 * MIB), MIB);
        assert!(matches!(
            budget(1024 * MIB, None, limited, 64 * MIB),
            Err(TransportError::LockedMemory { .. })
        ));
        assert_eq!(budget(7 * MIB, None, limited, 64 * MIB).unwrap(), None);
    }
}

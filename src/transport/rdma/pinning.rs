use std::sync::Arc;

use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use super::slices::SLICE_BYTES_MIN;
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::preflight::{self, Memlock};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Below this, registering RAM in turn costs more than RDMA gains over TCP: RDMA is not chosen unless asked for by name.
const WORTHWHILE_BYTES: u64 = 64 << 20;

/// How much of `ram` may be registered at once at this end; `None` if all of it may.
///
/// # Errors
/// [`TransportError::LockedMemory`] if that is too little to move a guest, or, unless RDMA was asked for `by_name`, too
/// little to be worth it.
pub(super) fn pin_budget(
    ram: &GuestRam,
    pin_max_bytes: Option<u64>,
    by_name: bool,
) -> Result<Option<u64>, TransportError> {
    let least = if by_name { SLICE_BYTES_MIN } else { WORTHWHILE_BYTES };
    budget(ram.layout().total_bytes(), pin_max_bytes, preflight::memlock(), least)
}

fn budget(
    ram_bytes: u64,
    pin_max_bytes: Option<u64>,
    memlock: Memlock,
    least_bytes: u64,
) -> Result<Option<u64>, TransportError> {
    // Some devices have their queues pinned too, against the same limit.
    let lockable = memlock.limit_bytes.filter(|_| !memlock.allows(ram_bytes)).map(|limit| limit - limit / 8);
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
        let free = Memlock { limit_bytes: Some(MIB), may_exceed: true };
        assert_eq!(budget(1024 * MIB, None, free, MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, None, Memlock::default(), MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, None, limited(1024 * MIB), MIB).unwrap(), None);
        assert_eq!(budget(1024 * MIB, Some(1024 * MIB), free, MIB).unwrap(), None);
    }

    #[test]
    fn the_lesser_limit_counts() {
        assert_eq!(budget(1024 * MIB, None, limited(64 * MIB), MIB).unwrap(), Some(56 * MIB));
        assert_eq!(budget(1024 * MIB, Some(8 * MIB), limited(64 * MIB), MIB).unwrap(), Some(8 * MIB));
        assert_eq!(budget(1024 * MIB, Some(80 * MIB), limited(64 * MIB), MIB).unwrap(), Some(56 * MIB));
    }

    #[test]
    fn too_little_is_refused_unless_the_guest_is_as_small() {
        assert!(matches!(
            budget(1024 * MIB, None, limited(8 * MIB), 64 * MIB),
            Err(TransportError::LockedMemory { .. })
        ));
        assert_eq!(budget(8 * MIB, None, limited(8 * MIB), 64 * MIB).unwrap(), None);
    }
}

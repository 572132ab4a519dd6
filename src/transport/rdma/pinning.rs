use std::sync::Arc;

use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::preflight;
use crate::transport::TransportError;
use crate::wire::SliceRange;

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

/// Refuses early what the kernel would refuse after pinning half of the guest.
pub(super) fn check_memlock(ram: &GuestRam) -> Result<(), TransportError> {
    let (memlock, needed_bytes) = (preflight::memlock(), ram.layout().total_bytes());
    if memlock.allows(needed_bytes) {
        return Ok(());
    }
    Err(TransportError::LockedMemory { needed_bytes, limit_bytes: memlock.limit_bytes.unwrap_or(0) })
}

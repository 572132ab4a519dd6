//! The RAM of a QEMU guest, mapped by this process too.

use std::sync::Arc;

use sterna::guest::GuestError;
use sterna::memory::{GuestRam, RamRegion, RegionLayout};
use sterna_qemu::names::SharedBlock;
use sterna_qemu::shared_ram::SharedRam;

/// Maps all shared blocks, in the order of their names: both ends have the same then, whatever the order in
/// which their QEMUs list the blocks.
pub(super) fn map(mut shared: Vec<SharedRam>) -> Result<(GuestRam, Vec<SharedBlock>), GuestError> {
    shared.sort_by(|a, b| a.block.name.cmp(&b.block.name));
    let mut regions = Vec::with_capacity(shared.len());
    let mut blocks = Vec::with_capacity(shared.len());
    let mut guest_address = 0u64;
    for SharedRam { block, file, offset_bytes, .. } in shared {
        let layout = RegionLayout { guest_address, len_bytes: block.len_bytes };
        guest_address = guest_address
            .checked_add(block.len_bytes)
            .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
            .ok_or_else(|| GuestError::new("its RAM is larger than any address"))?;
        regions.push(RamRegion::map_file(layout, Arc::new(file), offset_bytes)?);
        blocks.push(block);
    }
    Ok((GuestRam::from_regions(regions)?, blocks))
}

/// The addresses only number the blocks, because a guest sees its blocks elsewhere. A block begins at a
/// multiple of the largest page.
const ALIGNMENT: u64 = 1 << 30;

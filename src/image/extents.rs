//! The ranges of a file that hold data, and the parts made from these ranges.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::digest::BLOCK_PAGES;
use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout, RegionLayout};

/// The unit of parts and digests: 2 MiB.
pub(super) const BLOCK_BYTES: u64 = BLOCK_PAGES * PAGE_BYTES;

/// The ranges of a file's first `len_bytes` that hold data, in order. On a file system that does not report
/// holes, the whole file is one range.
pub(super) fn extents(file: &File, len_bytes: u64) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len_bytes {
            return None;
        }
        let found = next_extent(file, at, len_bytes).transpose();
        at = match &found {
            Some(Ok(extent)) => extent.end,
            _ => len_bytes,
        };
        found
    })
}

/// The first extent that ends after `at`, without its bytes before `at`.
pub(super) fn next_extent(file: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    // Both move the file's position, which is not used otherwise.
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < end => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..end)),
        Err(error) => return Err(error.into()),
    };
    let hole = rustix::fs::seek(file, SeekFrom::Hole(start)).or_else(|error| match error {
        Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP => Ok(end),
        error => Err(error),
    })?;
    Ok(Some(start..hole.clamp(start + 1, end)))
}

/// The data of a file to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Whole blocks with data, joined; parts include holes between them if there would otherwise be more
    /// parts than a layout allows.
    pub(super) parts: RamLayout,
    pub(super) data_bytes: u64,
}

impl Content {
    pub(super) fn of(file: &File, len_bytes: u64) -> io::Result<Self> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        let mut data_bytes = 0;
        for extent in extents(file, len_bytes) {
            let extent = extent?;
            data_bytes += extent.end - extent.start;
            let blocks = extent.start / BLOCK_BYTES..extent.end.div_ceil(BLOCK_BYTES);
            join(&mut parts, blocks, 0);
        }
        let mut gap = 1;
        while parts.len() > RamLayout::REGIONS_MAX {
            let finer = std::mem::take(&mut parts);
            finer.into_iter().for_each(|part| join(&mut parts, part, gap));
            gap *= 2;
        }
        let end = len_bytes.next_multiple_of(PAGE_BYTES);
        let region = |blocks: Range<u64>| {
            let guest_address = blocks.start * BLOCK_BYTES;
            RegionLayout { guest_address, len_bytes: (blocks.end * BLOCK_BYTES).min(end) - guest_address }
        };
        Ok(Self { parts: RamLayout { regions: parts.into_iter().map(region).collect() }, data_bytes })
    }

    /// The pages of the parts that hold data.
    pub(super) fn data_pages(&self, file: &File, len_bytes: u64) -> io::Result<DirtyBitmap> {
        let mut pages = DirtyBitmap::new(&self.parts);
        for extent in extents(file, len_bytes) {
            let extent = extent?;
            // An extent outside of all parts is new: the file changed, which is detected at the end.
            let Some((region, start)) = region_of(&self.parts, extent.start) else { continue };
            let last = (extent.end - 1 - start).min(self.parts.regions[region].len_bytes - 1) / PAGE_BYTES;
            pages.regions_mut()[region].mark((extent.start - start) / PAGE_BYTES..last + 1);
        }
        Ok(pages)
    }
}

/// Appends blocks to ascending parts; they join the last part if at most `gap` blocks lie between.
fn join(parts: &mut Vec<Range<u64>>, blocks: Range<u64>, gap: u64) {
    match parts.last_mut() {
        Some(last) if blocks.start <= last.end + gap => last.end = last.end.max(blocks.end),
        _ => parts.push(blocks),
    }
}

/// The region that contains this offset of the file, and where the region begins.
pub(super) fn region_of(parts: &RamLayout, at: u64) -> Option<(usize, u64)> {
    let after = parts.regions.partition_point(|region| region.guest_address <= at);
    let region = parts.regions.get(after.checked_sub(1)?)?;
    (at - region.guest_address < region.len_bytes).then_some((after - 1, region.guest_address))
}

/// The holes around and between the parts, up to `end`.
pub(super) fn gaps(parts: &RamLayout, end: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = parts.regions.iter().map(|region| region.guest_address + region.len_bytes);
    let ends = parts.regions.iter().map(|region| region.guest_address);
    let gaps = std::iter::once(0).chain(starts).zip(ends.chain([end]));
    gaps.map(|(start, end)| start..end).filter(|gap| gap.start < gap.end)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn sparse(len_bytes: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len_bytes).unwrap();
        data.iter().for_each(|&at| file.write_all_at(b"tern", at).unwrap());
        file
    }

    #[test]
    fn parts_are_the_blocks_with_data_and_data_pages_are_exact() {
        let len_bytes = 21 * MIB + 5000;
        let file = sparse(len_bytes, &[3 * MIB, 4 * MIB + 4096, 21 * MIB + 4100]);
        let content = Content::of(&file, len_bytes).unwrap();
        let parts: Vec<_> =
            content.parts.regions.iter().map(|part| (part.guest_address, part.len_bytes)).collect();
        assert_eq!(parts, [(2 * MIB, 4 * MIB), (20 * MIB, MIB + 8192)]);
        assert!(content.parts.validate().is_ok());
        assert_eq!(content.data_bytes, 4096 + 4096 + 904);
        let pages = content.data_pages(&file, len_bytes).unwrap();
        assert_eq!(pages.count(), 3);
        assert_eq!(pages.regions()[0].words()[4], 1, "1 MiB into the part");
        assert_eq!(pages.regions()[1].words()[4], 2, "the last page of the file");
        let between: Vec<_> = gaps(&content.parts, len_bytes).collect();
        assert_eq!(between, [0..2 * MIB, 6 * MIB..20 * MIB]);
    }

    #[test]
    fn there_are_never_more_parts_than_a_layout_has() {
        let data: Vec<_> = (0..3000).map(|index| index * 3 * BLOCK_BYTES).collect();
        let len_bytes = 3000 * 3 * BLOCK_BYTES;
        let content = Content::of(&sparse(len_bytes, &data), len_bytes).unwrap();
        assert!(content.parts.validate().is_ok());
        assert!(data.iter().all(|&at| region_of(&content.parts, at).is_some()));
        assert_eq!(content.data_bytes, 3000 * 4096);
    }

    #[test]
    fn a_file_that_is_one_hole_has_no_parts() {
        for len_bytes in [0, 1, 1 << 40] {
            let content = Content::of(&sparse(len_bytes, &[]), len_bytes).unwrap();
            assert_eq!((content.parts.regions.len(), content.data_bytes), (0, 0));
        }
    }
}

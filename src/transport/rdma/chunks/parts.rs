//! The division of a chunk into parts: only data is registered, in few parts.

use std::ops::Range;

use super::coverage::{BLOCK_PAGES, blocks_of};
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::transport::rdma::wire::ChunkRange;

/// The most parts cut out of a chunk. Beyond that, whole gaps between parts are registered, one part a gap,
/// so that a chunk ends with at most twice as many parts and one more.
const PARTS_MAX: usize = 16;

/// A hole of fewer blocks is registered with the data around it: 1 MiB. Registering it costs less than
/// another part.
const HOLE_BLOCKS_MIN: u64 = 4;

/// How many parts may be registered at once: on average one for every 2 MiB of RAM, which chunks with the
/// maximal number of parts reach. A destination grants no more, a source asks for no more. Each part takes
/// some memory of the kernel and the device.
pub(in crate::transport::rdma) fn parts_max(layout: &RamLayout) -> usize {
    const PART_PAGES: u64 = 512;
    const MORE: u64 = 1024;
    usize::try_from(layout.total_pages() / PART_PAGES + MORE).unwrap_or(usize::MAX)
}

/// Whether a part consists of whole blocks, unless it ends with its region, which has this many pages.
pub(in crate::transport::rdma) fn is_of_blocks(part: &ChunkRange, region_pages: u64) -> bool {
    let end = part.first_page.checked_add(part.pages).filter(|&end| end <= region_pages);
    let ends = |end: u64| end == region_pages || end.is_multiple_of(BLOCK_PAGES);
    part.pages > 0 && part.first_page.is_multiple_of(BLOCK_PAGES) && end.is_some_and(ends)
}

/// Whether a page, by its region, lies in a part.
pub(in crate::transport::rdma) fn contains(part: ChunkRange, (region, page): (usize, u64)) -> bool {
    usize::from(part.region) == region && (part.first_page..part.first_page + part.pages).contains(&page)
}

pub(super) fn bytes_of(range: ChunkRange) -> u64 {
    range.pages * PAGE_BYTES
}

/// The parts of a chunk to register so that all `needed` blocks are registered. `registered` are the existing
/// parts. Both are in ascending order by their first block, and `needed` may overlap anything.
pub(super) fn cut(
    chunk: ChunkRange,
    registered: &[ChunkRange],
    needed: impl IntoIterator<Item = Range<u64>>,
) -> Vec<ChunkRange> {
    let gaps = gaps(blocks_of(chunk), registered);
    let mut parts: Vec<(usize, Range<u64>)> = Vec::new();
    let mut gap = 0;
    for needed in united(needed) {
        while gap < gaps.len() && gaps[gap].end <= needed.start {
            gap += 1;
        }
        let overlapping = gaps.iter().enumerate().skip(gap).take_while(|(_, gap)| gap.start < needed.end);
        for (gap, free) in overlapping {
            let part = needed.start.max(free.start)..needed.end.min(free.end);
            match parts.last_mut() {
                Some((of, last)) if *of == gap && part.start < last.end + HOLE_BLOCKS_MIN => {
                    last.end = last.end.max(part.end);
                }
                _ => parts.push((gap, part)),
            }
        }
    }
    join(&mut parts, PARTS_MAX.saturating_sub(registered.len()));
    if registered.len() + parts.len() > PARTS_MAX {
        parts.iter_mut().for_each(|(gap, part)| *part = gaps[*gap].clone());
    }
    parts.into_iter().map(|(_, blocks)| range_of(chunk, &blocks)).collect()
}

/// The same blocks in runs that do not overlap.
fn united(runs: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut united: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match united.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => united.push(run),
        }
    }
    united
}

/// Joins neighbours in the same gap, over the smallest holes first, until at most `count` are left.
fn join(parts: &mut Vec<(usize, Range<u64>)>, count: usize) {
    let Some(surplus) = parts.len().checked_sub(count).filter(|&surplus| surplus > 0) else { return };
    let hole =
        |pair: &[(usize, Range<u64>)]| (pair[0].0 == pair[1].0).then(|| pair[1].1.start - pair[0].1.end);
    let mut holes: Vec<_> =
        parts.windows(2).enumerate().filter_map(|(index, pair)| Some((hole(pair)?, index + 1))).collect();
    holes.sort_unstable();
    holes.truncate(surplus);
    let mut joined: Vec<_> = holes.into_iter().map(|(_, index)| index).collect();
    joined.sort_unstable();
    // From the end, so that earlier indices stay valid.
    for index in joined.into_iter().rev() {
        let (_, part) = parts.remove(index);
        parts[index - 1].1.end = part.end;
    }
}

/// The blocks between registered parts.
fn gaps(chunk: Range<u64>, registered: &[ChunkRange]) -> Vec<Range<u64>> {
    let mut gaps = Vec::with_capacity(registered.len() + 1);
    let mut next = chunk.start;
    let end = std::iter::once(chunk.end..chunk.end);
    for blocks in registered.iter().map(|&part| blocks_of(part)).chain(end) {
        if next < blocks.start {
            gaps.push(next..blocks.start);
        }
        next = blocks.end;
    }
    gaps
}

fn range_of(chunk: ChunkRange, blocks: &Range<u64>) -> ChunkRange {
    let first_page = blocks.start * BLOCK_PAGES;
    let end = (blocks.end * BLOCK_PAGES).min(chunk.first_page + chunk.pages);
    ChunkRange { first_page, pages: end - first_page, ..chunk }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The second chunk of 64 MiB, less the last 7 pages.
    const CHUNK: ChunkRange = ChunkRange { region: 1, first_page: 16_384, pages: 16_384 - 7 };
    const FIRST: u64 = CHUNK.first_page / BLOCK_PAGES;

    /// The parts, in blocks from the chunk's first.
    fn cut_blocks(registered: &[ChunkRange], needed: &[Range<u64>]) -> Vec<Range<u64>> {
        let needed = needed.iter().map(|needed| FIRST + needed.start..FIRST + needed.end);
        let parts = cut(CHUNK, registered, needed);
        let blocks = |part| blocks_of(part).start - FIRST..blocks_of(part).end - FIRST;
        parts.into_iter().map(blocks).collect()
    }

    fn part(blocks: Range<u64>) -> ChunkRange {
        range_of(CHUNK, &(FIRST + blocks.start..FIRST + blocks.end))
    }

    #[test]
    fn a_full_chunk_is_one_part_and_a_sparse_one_only_its_data() {
        assert_eq!(cut(CHUNK, &[], [FIRST..FIRST + 100, FIRST + 100..FIRST + 300]), [CHUNK]);
        assert_eq!(cut_blocks(&[], &[0..1, 200..202]), [0..1, 200..202]);
        assert_eq!(cut_blocks(&[], &[0..1, 255..256]), [0..1, 255..256]);
        assert_eq!(part(255..256).pages, 64 - 7, "it ends with its region");
        assert!(cut(CHUNK, &[], []).is_empty());
    }

    #[test]
    fn small_holes_are_registered_with_the_data_around_them() {
        assert_eq!(cut_blocks(&[], &[0..1, 4..5, 9..10]), [0..5, 9..10]);
    }

    #[test]
    fn of_many_holes_only_the_largest_stay() {
        let needed: Vec<_> = (0..17).chain([19]).map(|index| index * 10..index * 10 + 1).collect();
        let parts = cut_blocks(&[], &needed);
        assert_eq!(parts.len(), PARTS_MAX);
        assert!(parts.ends_with(&[160..161, 190..191]), "{parts:?}");
    }

    #[test]
    fn what_is_registered_is_left_out_and_never_bridged() {
        let registered = [part(10..20), part(20..22), part(40..50)];
        assert_eq!(cut_blocks(&registered, &[5..45, 47..60]), [5..10, 22..40, 50..60]);
        assert_eq!(cut_blocks(&registered, &[8..9, 23..24]), [8..9, 23..24]);
    }

    #[test]
    fn a_chunk_in_many_parts_gets_whole_gaps() {
        let registered: Vec<_> = (0..16).map(|index| part(index * 16..index * 16 + 1)).collect();
        assert_eq!(cut_blocks(&registered, &[20..21, 26..27, 250..251]), [17..32, 241..256]);
    }

    proptest! {
        /// After any sequence of requests the requested blocks are registered, no block twice, and in few
        /// parts.
        #[test]
        fn parts_cover_what_is_needed_do_not_overlap_and_are_few(
            asked in prop::collection::vec(prop::collection::vec((0..256u64, 1..20u64), 1..6), 1..80),
        ) {
            let mut registered: Vec<ChunkRange> = Vec::new();
            for mut needed in asked {
                needed.sort_unstable();
                let blocks = needed.iter().map(|&(first, count)| FIRST + first..(FIRST + first + count).min(FIRST + 256));
                let parts = cut(CHUNK, &registered, blocks.clone());
                for part in &parts {
                    prop_assert!(is_of_blocks(part, CHUNK.first_page + CHUNK.pages), "{:?}", part);
                }
                registered.extend(parts);
                registered.sort_unstable_by_key(|part| part.first_page);
                for pair in registered.windows(2) {
                    prop_assert!(pair[0].first_page + pair[0].pages <= pair[1].first_page, "{:?}", pair);
                }
                for block in blocks.flatten() {
                    prop_assert!(registered.iter().any(|&part| blocks_of(part).contains(&block)), "{}", block);
                }
                prop_assert!(registered.len() <= 2 * PARTS_MAX + 1, "{}", registered.len());
            }
        }
    }
}

use std::collections::VecDeque;
use std::ops::Range;
use std::thread;

use proptest::prelude::*;

use super::coverage::blocks_of;
use super::*;
use crate::memory::RegionLayout;

const MIB: u64 = 1 << 20;

fn layout(regions_mib: &[u64]) -> RamLayout {
    let region = |(index, mib): (usize, &u64)| RegionLayout {
        guest_address: (index as u64) << 40,
        len_bytes: mib * MIB,
    };
    RamLayout { regions: regions_mib.iter().enumerate().map(region).collect() }
}

fn chunk(region: u16, first_page: u64, pages: u64) -> ChunkRange {
    ChunkRange { region, first_page, pages }
}

/// The whole chunk is needed.
fn all(chunk: ChunkRange) -> Result<Vec<Range<u64>>, TransportError> {
    Ok(vec![blocks_of(chunk)])
}

/// The next `parts` planned parts.
fn next<S>(chunks: &Chunks<S>, planned: &mut Planned, parts: usize, wait: bool) -> Batch<S> {
    let size = BatchSize { parts, pages: u64::MAX };
    chunks.next(planned, &mut all, size, wait).expect("holes are found")
}

fn planned(chunks: impl Into<VecDeque<ChunkRange>>) -> Planned {
    Planned::new(chunks.into())
}

/// All missing parts, as chunks.
fn plan<S>(chunks: &Chunks<S>, dirty: &DirtyBitmap) -> Vec<ChunkRange> {
    let (mut planned, state) = (chunks.plan(dirty), chunks.state());
    std::iter::from_fn(|| planned.next(&state, &mut all).expect("holes are found")).collect()
}

#[test]
fn chunks_with_dirty_pages_are_planned_in_order_and_only_once() {
    let chunks: Chunks<()> = Chunks::new(layout(&[9, 1]), 1, None);
    let mut dirty = DirtyBitmap::new(&layout(&[9, 1]));
    assert!(plan(&chunks, &dirty).is_empty());
    let [first, second, third, other] =
        [chunk(0, 0, 1024), chunk(0, 1024, 1024), chunk(0, 2048, 256), chunk(1, 0, 256)];
    dirty.regions_mut()[0].mark(2303..2304);
    assert_eq!(plan(&chunks, &dirty), [third]);
    dirty.regions_mut()[0].mark(1023..1025);
    assert_eq!(plan(&chunks, &dirty), [first, second, third]);
    dirty.fill();
    assert_eq!(plan(&chunks, &dirty), [first, second, third, other]);
    chunks.set(third, ());
    assert_eq!(plan(&chunks, &dirty), [first, second, other]);
}

#[test]
fn a_chunk_that_is_registered_whole_is_found_without_a_lock_where_there_is_room_for_all() {
    let layout = layout(&[9, 200]);
    let [whole, part] = [chunk(1, 32_768, 16_384), chunk(1, 16_384, 64)];
    for budget_bytes in [None, Some(64 * MIB)] {
        let chunks: Chunks<u64> = Chunks::new(layout.clone(), 1, budget_bytes);
        let found = |page| chunks.whole(1, page).map(|(range, &value)| (range, value));
        assert_eq!(found(32_768), None);
        chunks.set(whole, 7);
        chunks.set(part, 8);
        let state = chunks.state();
        let expected = budget_bytes.is_none().then_some((whole, 7));
        assert_eq!([32_768, 40_000, 49_151].map(found), [expected; 3]);
        assert_eq!([0, 16_384, 32_767, 49_152, u64::MAX].map(found), [None; 5]);
        drop(state);
        assert_eq!(chunks.acquire(1, 16_390).map(|(range, value)| (range, *value)), Some((part, 8)));
    }
}

#[test]
fn what_a_lane_waits_for_comes_before_the_plan_and_failure_wakes_it() {
    let chunks: Chunks<()> = Chunks::new(layout(&[64, 1]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| chunks.await_part(1, 7).map(|_| ()));
        while chunks.state().wanted.is_empty() {
            thread::yield_now();
        }
        let mut planned = planned([chunk(0, 0, 1024)]);
        assert_eq!(next(&chunks, &mut planned, 1, true).ranges, [chunk(1, 0, 256)]);
        assert_eq!(next(&chunks, &mut planned, 1, true).ranges, [chunk(0, 0, 1024)]);
        chunks.fail();
        let failed = lane.join().unwrap();
        assert!(matches!(failed, Err(TransportError::NotRegistered { .. })), "it is no fault of the peer's");
        chunks.end();
        assert!(next(&chunks, &mut planned, 1, true).ranges.is_empty());
    });
}

#[test]
fn of_a_chunk_with_holes_only_what_has_data_is_registered_and_a_hole_once_a_lane_asks_for_it() {
    let chunks: Chunks<u64> = Chunks::new(layout(&[64]), 1, None);
    let mut dirty = DirtyBitmap::new(&layout(&[64]));
    dirty.regions_mut()[0].mark(8192..16_384);
    let mut planned = chunks.plan(&dirty);
    let size = BatchSize { parts: 4, pages: u64::MAX };
    let blocks = |chunk: ChunkRange| [9, 10].map(|block| chunk.first_page / 64 + block);
    let mut find = |chunk| Ok(blocks(chunk).map(|block| block..block + 1).to_vec());
    let batch = chunks.next(&mut planned, &mut find, size, false).unwrap();
    assert_eq!(batch.ranges, [chunk(0, 8192 + 9 * 64, 128)]);
    chunks.set(batch.ranges[0], 7);
    assert_eq!(chunks.registered_bytes(), 512 << 10);
    assert!(chunks.acquire(0, 8192).is_none());
    let (part, value) = chunks.acquire(0, 8192 + 10 * 64 + 5).unwrap();
    assert_eq!((part, *value), (batch.ranges[0], 7));

    thread::scope(|scope| {
        let lane = scope.spawn(|| chunks.await_part(0, 16_383).map(|(part, _)| part));
        let batch = chunks.next(&mut planned, &mut find, size, true).unwrap();
        assert_eq!(batch.ranges, [chunk(0, 16_384 - 64, 64)], "the rest is registered");
        chunks.set(batch.ranges[0], 8);
        assert_eq!(lane.join().unwrap().unwrap(), batch.ranges[0]);
    });
    let mut later = DirtyBitmap::new(&layout(&[64]));
    later.regions_mut()[0].mark(16_383..16_384);
    assert!(plan(&chunks, &later).is_empty());
    later.regions_mut()[0].mark(16_300..16_301);
    assert_eq!(
        plan(&chunks, &later).first(),
        Some(&chunk(0, 8192, 9 * 64)),
        "what is registered is left out"
    );
}

#[test]
fn a_registrar_that_panics_leaves_no_lane_waiting() {
    let chunks: Chunks<()> = Chunks::new(layout(&[64]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| chunks.await_part(0, 1023).map(|_| ()));
        while chunks.state().wanted.is_empty() {
            thread::yield_now();
        }
        let registrar = scope.spawn(|| chunks.or_fail(|| -> Result<(), ()> { panic!("as a test wants it") }));
        assert!(registrar.join().is_err());
        let failed = chunks.state().failed;
        chunks.fail();
        assert!(failed, "the lane would wait until its patience ends");
        assert!(lane.join().unwrap().is_err());
    });
    assert_eq!(chunks.or_fail(|| Ok::<_, ()>(7)), Ok(7));
}

#[test]
fn room_is_made_of_what_no_lane_holds_least_recently_used_first() {
    let chunks: Chunks<u64> = Chunks::new(layout(&[16]), 1, Some(12 * MIB));
    let four = |index: u64| chunk(0, index * 1024, 1024);
    let register = |index: u64| {
        let batch = next(&chunks, &mut planned([four(index)]), 1, false);
        batch.ranges.iter().for_each(|&range| chunks.set(range, index));
        (batch.ranges.len(), batch.evicted.into_iter().map(|(_, index)| *index).collect::<Vec<_>>())
    };
    for index in 0..3 {
        assert_eq!(register(index), (1, vec![]));
    }
    assert_eq!(register(3), (0, vec![]), "the lanes have yet to come to all that is here");
    let held = chunks.acquire(0, 1024).unwrap();
    drop(chunks.acquire(0, 2048));
    drop(chunks.acquire(0, 0));
    assert_eq!(register(3), (1, vec![2]), "1 is held, and 0 was used later");
    drop(held);
    assert_eq!(register(2), (1, vec![1]));
}

#[test]
fn what_is_dirty_stays_and_what_is_missing_of_it_takes_the_place_of_what_is_not() {
    let layout = layout(&[64]);
    let chunks: Chunks<u64> = Chunks::new(layout.clone(), 1, Some(12 * MIB));
    let four = |index: u64| chunk(0, index * 1024, 1024);
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.fill();
    let mut planned = chunks.plan(&dirty);
    let first = next(&chunks, &mut planned, usize::MAX, false);
    assert_eq!(first.ranges, [four(0), four(1), four(2)], "there is room for no more");
    (0..3).for_each(|index| chunks.set(four(index), index));
    assert_eq!(chunks.missing_bytes(&dirty), (52 * MIB, 52 * MIB));
    (0..3).for_each(|index| drop(chunks.acquire(0, index * 1024)));

    dirty.clear();
    for page in [7, 5 * 1024, 8 * 1024, 9 * 1024 + 70] {
        dirty.regions_mut()[0].mark(page..page + 1);
    }
    assert_eq!(chunks.missing_bytes(&dirty), (768 << 10, 0), "a block for each page");
    chunks.begin();
    let batch = next(&chunks, &mut chunks.plan(&dirty), usize::MAX, false);
    assert_eq!(batch.ranges, [four(5), four(8)], "but chunks are needed whole here");
    let evicted: Vec<_> = batch.evicted.iter().map(|(range, _)| *range).collect();
    assert_eq!(evicted, [four(1), four(2)], "the first has a dirty page, though it was used longest ago");

    dirty.clear();
    dirty.regions_mut()[0].mark(1024..1025);
    assert_eq!(chunks.missing_bytes(&dirty), (256 << 10, 0), "what was evicted is missing again");
}

#[test]
fn what_all_lanes_passed_over_makes_room_for_what_they_come_to() {
    let chunks: Chunks<u64> = Chunks::new(layout(&[24]), 2, Some(12 * MIB));
    let four = |index: u64| chunk(0, index * 1024, 1024);
    let next = |index: u64| next(&chunks, &mut planned([four(index)]), 1, false);
    for index in 0..3 {
        next(index).ranges.iter().for_each(|&range| chunks.set(range, index));
    }
    chunks.reached(0, 0, 2048);
    assert!(next(3).ranges.is_empty(), "the other lane may come to each of them");
    chunks.reached(1, 0, 1024);
    let batch = next(3);
    assert_eq!((batch.ranges, batch.evicted[0].0), (vec![four(3)], four(0)), "both are past the first");
    chunks.set(four(3), 3);
    chunks.reached_end(0);
    chunks.reached_end(1);
    assert_eq!(next(4).evicted[0].0, four(1));
    chunks.set(four(4), 4);
    chunks.begin();
    assert!(next(5).ranges.is_empty(), "in the next round the lanes come to all again");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 8, ..ProptestConfig::default() })]

    /// Lanes that go through RAM in any order, each holding one part at a time, all reach their end. The
    /// registered parts never exceed the budget, and no part is registered twice, whatever the holes in RAM.
    #[test]
    fn under_any_budget_all_lanes_get_all_that_they_ask_for(
        budget_mib in 4u64..40,
        ways in prop::collection::vec(prop::collection::vec(0u64..16 * 1024, 1..40), 1..5),
        ahead in prop::bool::ANY,
        data_every in 1u64..40,
    ) {
        let layout = layout(&[64]);
        let mut dirty = DirtyBitmap::new(&layout);
        if ahead {
            dirty.fill();
        }
        let mut chunks: Chunks<()> = Chunks::new(layout, ways.len(), Some(budget_mib * MIB));
        // Ends the test if a lane waits in vain.
        chunks.patience = Duration::from_secs(20);
        let data_every_blocks = usize::try_from(data_every).expect("it is small");
        let mut planned = chunks.plan(&dirty);
        let (arrived, registered) = thread::scope(|scope| {
            let chunks = &chunks;
            let walk = |way: &[u64]| way.iter().try_for_each(|&page| {
                let held = chunks.acquire(0, page).map_or_else(|| chunks.await_part(0, page), Ok)?;
                drop(held);
                chunks.released();
                Ok::<_, TransportError>(())
            });
            let lanes: Vec<_> = ways.iter().map(|way| scope.spawn(move || walk(way))).collect();
            let find = move |chunk| Ok(blocks_of(chunk).step_by(data_every_blocks).map(|block| block..block + 1).collect());
            let registrar = scope.spawn(move || Pinned::default().register(chunks, &mut planned, &mut { find }));
            let arrived: Vec<_> = lanes.into_iter().map(thread::ScopedJoinHandle::join).collect();
            chunks.end();
            (arrived, registrar.join())
        });
        prop_assert!(arrived.iter().all(|arrived| matches!(arrived, Ok(Ok(())))), "{arrived:?}");
        let pinned = registered.expect("the registrar comes to its end");
        prop_assert!(pinned.most_bytes <= budget_mib * MIB, "{pinned:?}");
    }
}

/// The pinned memory by the registrar's own count.
#[derive(Debug, Default)]
struct Pinned {
    here: Vec<ChunkRange>,
    most_bytes: u64,
}

impl Pinned {
    fn register(mut self, chunks: &Chunks<()>, planned: &mut Planned, find: &mut FindBlocks<'_>) -> Self {
        loop {
            let size = BatchSize { parts: 2, pages: u64::MAX };
            let batch = chunks.next(planned, find, size, true).expect("holes are found");
            for (gone, chunk) in batch.evicted {
                Arc::into_inner(chunk).expect("no lane holds it");
                let index = self.here.iter().position(|&here| here == gone).expect("it was registered");
                self.here.swap_remove(index);
            }
            if batch.ranges.is_empty() {
                return self;
            }
            for &range in &batch.ranges {
                let overlaps = |here: &ChunkRange| {
                    range.first_page < here.first_page + here.pages
                        && here.first_page < range.first_page + range.pages
                };
                assert!(!self.here.iter().any(overlaps), "{range:?} and {:?}", self.here);
                self.here.push(range);
            }
            self.most_bytes = self.most_bytes.max(self.here.iter().map(|&range| bytes_of(range)).sum());
            batch.ranges.into_iter().for_each(|range| chunks.set(range, ()));
        }
    }
}

use std::collections::VecDeque;
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

fn slice(region: u16, first_page: u64, pages: u64) -> SliceRange {
    SliceRange { region, first_page, pages }
}

/// All of a slice is needed.
fn all(slice: SliceRange) -> Result<Vec<Range<u64>>, TransportError> {
    Ok(vec![blocks_of(slice)])
}

/// The next `parts` of what is planned.
fn next<S>(slices: &Slices<S>, planned: &mut Planned, parts: usize, wait: bool) -> Batch<S> {
    let size = BatchSize { parts, pages: u64::MAX };
    slices.next(planned, &mut all, size, wait).expect("holes are found")
}

fn planned(slices: impl Into<VecDeque<SliceRange>>) -> Planned {
    Planned::new(slices.into())
}

/// All that is missing, as slices.
fn plan<S>(slices: &Slices<S>, dirty: &DirtyBitmap) -> Vec<SliceRange> {
    let (mut planned, state) = (slices.plan(dirty), slices.state());
    std::iter::from_fn(|| planned.next(&state, &mut all).expect("holes are found")).collect()
}

#[test]
fn slices_with_dirty_pages_are_planned_in_order_and_only_once() {
    let slices: Slices<()> = Slices::new(layout(&[9, 1]), 1, None);
    let mut dirty = DirtyBitmap::new(&layout(&[9, 1]));
    assert!(plan(&slices, &dirty).is_empty());
    let [first, second, third, other] =
        [slice(0, 0, 1024), slice(0, 1024, 1024), slice(0, 2048, 256), slice(1, 0, 256)];
    dirty.regions_mut()[0].mark(2303..2304);
    assert_eq!(plan(&slices, &dirty), [third]);
    dirty.regions_mut()[0].mark(1023..1025);
    assert_eq!(plan(&slices, &dirty), [first, second, third]);
    dirty.fill();
    assert_eq!(plan(&slices, &dirty), [first, second, third, other]);
    slices.set(third, ());
    assert_eq!(plan(&slices, &dirty), [first, second, other]);
}

#[test]
fn what_a_lane_waits_for_comes_before_the_plan_and_failure_wakes_it() {
    let slices: Slices<()> = Slices::new(layout(&[64, 1]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| slices.await_part(1, 7).map(|_| ()));
        while slices.state().wanted.is_empty() {
            thread::yield_now();
        }
        let mut planned = planned([slice(0, 0, 1024)]);
        assert_eq!(next(&slices, &mut planned, 1, true).ranges, [slice(1, 0, 256)]);
        assert_eq!(next(&slices, &mut planned, 1, true).ranges, [slice(0, 0, 1024)]);
        slices.fail();
        let failed = lane.join().unwrap();
        assert!(matches!(failed, Err(TransportError::NotRegistered { .. })), "it is no fault of the peer's");
        slices.end();
        assert!(next(&slices, &mut planned, 1, true).ranges.is_empty());
    });
}

#[test]
fn of_a_slice_with_holes_only_what_has_data_is_registered_and_a_hole_once_a_lane_asks_for_it() {
    let slices: Slices<u64> = Slices::new(layout(&[64]), 1, None);
    let mut dirty = DirtyBitmap::new(&layout(&[64]));
    dirty.regions_mut()[0].mark(8192..16_384);
    let mut planned = slices.plan(&dirty);
    let size = BatchSize { parts: 4, pages: u64::MAX };
    let blocks = |slice: SliceRange| [9, 10].map(|block| slice.first_page / 64 + block);
    let mut find = |slice| Ok(blocks(slice).map(|block| block..block + 1).to_vec());
    let batch = slices.next(&mut planned, &mut find, size, false).unwrap();
    assert_eq!(batch.ranges, [slice(0, 8192 + 9 * 64, 128)]);
    slices.set(batch.ranges[0], 7);
    assert_eq!(slices.registered_bytes(), 512 << 10);
    assert!(slices.acquire(0, 8192).is_none());
    let (part, value) = slices.acquire(0, 8192 + 10 * 64 + 5).unwrap();
    assert_eq!((part, *value), (batch.ranges[0], 7));

    thread::scope(|scope| {
        let lane = scope.spawn(|| slices.await_part(0, 16_383).map(|(part, _)| part));
        let batch = slices.next(&mut planned, &mut find, size, true).unwrap();
        assert_eq!(batch.ranges, [slice(0, 16_384 - 64, 64)], "the rest is registered");
        slices.set(batch.ranges[0], 8);
        assert_eq!(lane.join().unwrap().unwrap(), batch.ranges[0]);
    });
    let mut later = DirtyBitmap::new(&layout(&[64]));
    later.regions_mut()[0].mark(16_383..16_384);
    assert!(plan(&slices, &later).is_empty());
    later.regions_mut()[0].mark(16_300..16_301);
    assert_eq!(
        plan(&slices, &later).first(),
        Some(&slice(0, 8192, 9 * 64)),
        "what is registered is left out"
    );
}

#[test]
fn a_registrar_that_panics_leaves_no_lane_waiting() {
    let slices: Slices<()> = Slices::new(layout(&[64]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| slices.await_part(0, 1023).map(|_| ()));
        while slices.state().wanted.is_empty() {
            thread::yield_now();
        }
        let registrar = scope.spawn(|| slices.supply(|| -> Result<(), ()> { panic!("as a test wants it") }));
        assert!(registrar.join().is_err());
        let failed = slices.state().failed;
        slices.fail();
        assert!(failed, "the lane would wait until its patience ends");
        assert!(lane.join().unwrap().is_err());
    });
    assert_eq!(slices.supply(|| Ok::<_, ()>(7)), Ok(7));
}

#[test]
fn room_is_made_of_what_no_lane_holds_least_recently_used_first() {
    let slices: Slices<u64> = Slices::new(layout(&[16]), 1, Some(12 * MIB));
    let four = |index: u64| slice(0, index * 1024, 1024);
    let register = |index: u64| {
        let batch = next(&slices, &mut planned([four(index)]), 1, false);
        batch.ranges.iter().for_each(|&range| slices.set(range, index));
        (batch.ranges.len(), batch.evicted.into_iter().map(|(_, index)| *index).collect::<Vec<_>>())
    };
    for index in 0..3 {
        assert_eq!(register(index), (1, vec![]));
    }
    assert_eq!(register(3), (0, vec![]), "the lanes have yet to come to all that is here");
    let held = slices.acquire(0, 1024).unwrap();
    drop(slices.acquire(0, 2048));
    drop(slices.acquire(0, 0));
    assert_eq!(register(3), (1, vec![2]), "1 is held, and 0 was used later");
    drop(held);
    assert_eq!(register(2), (1, vec![1]));
}

#[test]
fn what_is_dirty_stays_and_what_is_missing_of_it_takes_the_place_of_what_is_not() {
    let layout = layout(&[64]);
    let slices: Slices<u64> = Slices::new(layout.clone(), 1, Some(12 * MIB));
    let four = |index: u64| slice(0, index * 1024, 1024);
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.fill();
    let mut planned = slices.plan(&dirty);
    let first = next(&slices, &mut planned, usize::MAX, false);
    assert_eq!(first.ranges, [four(0), four(1), four(2)], "there is room for no more");
    (0..3).for_each(|index| slices.set(four(index), index));
    assert_eq!(slices.missing_bytes(&dirty), (52 * MIB, 52 * MIB));
    (0..3).for_each(|index| drop(slices.acquire(0, index * 1024)));

    dirty.clear();
    for page in [7, 5 * 1024, 8 * 1024, 9 * 1024 + 70] {
        dirty.regions_mut()[0].mark(page..page + 1);
    }
    assert_eq!(slices.missing_bytes(&dirty), (768 << 10, 0), "a block for each page");
    slices.begin();
    let batch = next(&slices, &mut slices.plan(&dirty), usize::MAX, false);
    assert_eq!(batch.ranges, [four(5), four(8)], "but slices are needed whole here");
    let evicted: Vec<_> = batch.evicted.iter().map(|(range, _)| *range).collect();
    assert_eq!(evicted, [four(1), four(2)], "the first has a dirty page, though it was used longest ago");
}

#[test]
fn what_all_lanes_passed_over_makes_room_for_what_they_come_to() {
    let slices: Slices<u64> = Slices::new(layout(&[24]), 2, Some(12 * MIB));
    let four = |index: u64| slice(0, index * 1024, 1024);
    let next = |index: u64| next(&slices, &mut planned([four(index)]), 1, false);
    for index in 0..3 {
        next(index).ranges.iter().for_each(|&range| slices.set(range, index));
    }
    slices.reached(0, 0, 2048);
    assert!(next(3).ranges.is_empty(), "the other lane may come to each of them");
    slices.reached(1, 0, 1024);
    let batch = next(3);
    assert_eq!((batch.ranges, batch.evicted[0].0), (vec![four(3)], four(0)), "both are past the first");
    slices.set(four(3), 3);
    slices.reached_end(0);
    slices.reached_end(1);
    assert_eq!(next(4).evicted[0].0, four(1));
    slices.set(four(4), 4);
    slices.begin();
    assert!(next(5).ranges.is_empty(), "in the next round the lanes come to all again");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 8, ..ProptestConfig::default() })]

    /// Lanes that go through RAM in any order, each holding one part at a time, all come to their end, and
    /// never is more registered than the budget holds, or anything twice; whatever the holes in RAM are.
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
        let mut slices: Slices<()> = Slices::new(layout, ways.len(), Some(budget_mib * MIB));
        // For a lane that waits in vain: the test has an end.
        slices.patience = Duration::from_secs(20);
        let data_every_blocks = usize::try_from(data_every).expect("it is small");
        let mut planned = slices.plan(&dirty);
        let (arrived, registered) = thread::scope(|scope| {
            let slices = &slices;
            let walk = |way: &[u64]| way.iter().try_for_each(|&page| {
                let held = slices.acquire(0, page).map_or_else(|| slices.await_part(0, page), Ok)?;
                drop(held);
                slices.released();
                Ok::<_, TransportError>(())
            });
            let lanes: Vec<_> = ways.iter().map(|way| scope.spawn(move || walk(way))).collect();
            let find = move |slice| Ok(blocks_of(slice).step_by(data_every_blocks).map(|block| block..block + 1).collect());
            let registrar = scope.spawn(move || Pinned::default().register(slices, &mut planned, &mut { find }));
            let arrived: Vec<_> = lanes.into_iter().map(thread::ScopedJoinHandle::join).collect();
            slices.end();
            (arrived, registrar.join())
        });
        prop_assert!(arrived.iter().all(|arrived| matches!(arrived, Ok(Ok(())))), "{arrived:?}");
        let pinned = registered.expect("the registrar comes to its end");
        prop_assert!(pinned.most_bytes <= budget_mib * MIB, "{pinned:?}");
    }
}

/// What a registrar has pinned, by its own count.
#[derive(Debug, Default)]
struct Pinned {
    here: Vec<SliceRange>,
    most_bytes: u64,
}

impl Pinned {
    fn register(mut self, slices: &Slices<()>, planned: &mut Planned, find: &mut FindBlocks<'_>) -> Self {
        loop {
            let size = BatchSize { parts: 2, pages: u64::MAX };
            let batch = slices.next(planned, find, size, true).expect("holes are found");
            for (gone, slice) in batch.evicted {
                Arc::into_inner(slice).expect("no lane holds it");
                let index = self.here.iter().position(|&here| here == gone).expect("it was registered");
                self.here.swap_remove(index);
            }
            if batch.ranges.is_empty() {
                return self;
            }
            for &range in &batch.ranges {
                let overlaps = |here: &SliceRange| {
                    range.first_page < here.first_page + here.pages
                        && here.first_page < range.first_page + range.pages
                };
                assert!(!self.here.iter().any(overlaps), "{range:?} and {:?}", self.here);
                self.here.push(range);
            }
            self.most_bytes = self.most_bytes.max(self.here.iter().map(|&range| bytes_of(range)).sum());
            batch.ranges.into_iter().for_each(|range| slices.set(range, ()));
        }
    }
}

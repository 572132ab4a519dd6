use std::thread;

use proptest::prelude::*;

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

#[test]
fn slices_with_dirty_pages_are_planned_in_order_and_only_once() {
    let slices: Slices<()> = Slices::new(layout(&[9, 1]), 1, None);
    let mut dirty = DirtyBitmap::new(&layout(&[9, 1]));
    assert!(slices.plan(&dirty).is_empty());
    let [first, second, third, other] =
        [slice(0, 0, 1024), slice(0, 1024, 1024), slice(0, 2048, 256), slice(1, 0, 256)];
    dirty.regions_mut()[0].mark(2303..2304);
    assert_eq!(slices.plan(&dirty), [third]);
    dirty.regions_mut()[0].mark(1023..1025);
    assert_eq!(slices.plan(&dirty), [first, second, third]);
    dirty.fill();
    assert_eq!(slices.plan(&dirty), [first, second, third, other]);
    slices.set(third, ());
    assert_eq!(slices.plan(&dirty), [first, second, other]);
}

#[test]
fn what_a_lane_waits_for_comes_before_the_plan_and_failure_wakes_it() {
    let slices: Slices<()> = Slices::new(layout(&[64, 1]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| slices.await_slice(slice(1, 0, 256)).map(|_| ()));
        while slices.state().wanted.is_empty() {
            thread::yield_now();
        }
        let mut planned = [slice(0, 0, 1024)].into();
        assert_eq!(slices.next(&mut planned, 1, true).ranges, [slice(1, 0, 256)]);
        assert_eq!(slices.next(&mut planned, 1, true).ranges, [slice(0, 0, 1024)]);
        slices.fail();
        let failed = lane.join().unwrap();
        assert!(matches!(failed, Err(TransportError::NotRegistered { .. })), "it is no fault of the peer's");
        slices.end();
        assert!(slices.next(&mut planned, 1, true).ranges.is_empty());
    });
}

#[test]
fn a_registrar_that_panics_leaves_no_lane_waiting() {
    let slices: Slices<()> = Slices::new(layout(&[64]), 1, None);
    thread::scope(|scope| {
        let lane = scope.spawn(|| slices.await_slice(slice(0, 0, 1024)).map(|_| ()));
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
        let mut planned = [four(index)].into();
        let batch = slices.next(&mut planned, 1, false);
        batch.ranges.iter().for_each(|&range| slices.set(range, index));
        (batch.ranges.len(), batch.evicted.into_iter().map(|(_, index)| *index).collect::<Vec<_>>())
    };
    for index in 0..3 {
        assert_eq!(register(index), (1, vec![]));
    }
    assert_eq!(register(3), (0, vec![]), "the lanes have yet to come to all that is here");
    let held = slices.acquire(four(1)).unwrap();
    drop(slices.acquire(four(2)));
    drop(slices.acquire(four(0)));
    assert_eq!(register(3), (1, vec![2]), "1 is held, and 0 was used later");
    drop(held);
    assert_eq!(register(2), (1, vec![1]));
}

#[test]
fn what_all_lanes_passed_over_makes_room_for_what_they_come_to() {
    let slices: Slices<u64> = Slices::new(layout(&[24]), 2, Some(12 * MIB));
    let four = |index: u64| slice(0, index * 1024, 1024);
    let next = |index: u64| slices.next(&mut [four(index)].into(), 1, false);
    for index in 0..3 {
        next(index).ranges.iter().for_each(|&range| slices.set(range, index));
    }
    slices.reached(0, four(2));
    assert!(next(3).ranges.is_empty(), "the other lane may come to each of them");
    slices.reached(1, four(1));
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

    /// Lanes that go through RAM in any order, each holding one slice at a time, all come to their end, and never is more
    /// registered than the budget holds.
    #[test]
    fn under_any_budget_all_lanes_get_all_that_they_ask_for(
        budget_mib in 4u64..40,
        ways in prop::collection::vec(prop::collection::vec(0u64..16 * 1024, 1..40), 1..5),
        ahead in prop::bool::ANY,
    ) {
        let layout = layout(&[64]);
        let mut dirty = DirtyBitmap::new(&layout);
        if ahead {
            dirty.fill();
        }
        let mut slices: Slices<()> = Slices::new(layout, ways.len(), Some(budget_mib * MIB));
        // For a lane that waits in vain: the test has an end.
        slices.patience = Duration::from_secs(20);
        let mut planned = slices.plan(&dirty);
        let (arrived, registered) = thread::scope(|scope| {
            let slices = &slices;
            let walk = |way: &[u64]| way.iter().try_for_each(|&page| {
                let range = slices.range_of(0, page).expect("it lies in RAM");
                let held = slices.acquire(range).map_or_else(|| slices.await_slice(range), Ok)?;
                drop(held);
                slices.released();
                Ok::<_, TransportError>(())
            });
            let lanes: Vec<_> = ways.iter().map(|way| scope.spawn(move || walk(way))).collect();
            let registrar = scope.spawn(move || Pinned::default().register(slices, &mut planned));
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
    fn register(mut self, slices: &Slices<()>, planned: &mut VecDeque<SliceRange>) -> Self {
        loop {
            let batch = slices.next(planned, 2, true);
            for (gone, slice) in batch.evicted {
                Arc::into_inner(slice).expect("no lane holds it");
                let index = self.here.iter().position(|&here| here == gone).expect("it was registered");
                self.here.swap_remove(index);
            }
            if batch.ranges.is_empty() {
                return self;
            }
            self.here.extend(&batch.ranges);
            self.most_bytes = self.most_bytes.max(self.here.iter().map(|&range| bytes_of(range)).sum());
            batch.ranges.into_iter().for_each(|range| slices.set(range, ()));
        }
    }
}

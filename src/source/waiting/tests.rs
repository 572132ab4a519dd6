use proptest::prelude::*;

use super::*;
use crate::memory::RegionLayout;

/// What a guest and its migration do.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write {
        page: usize,
    },
    /// A round that takes so long, after which so many pages may wait. The guest writes one meanwhile.
    Round {
        millis: u64,
        pages_max: u64,
        written: usize,
    },
    /// The lanes were replaced: all pages are dirty again.
    BeginAnew,
}

const PAGES: usize = 200;

/// A page a millisecond.
const PAGES_PER_SECOND: f64 = 1000.0;

/// A migration as the engine makes it: versions of pages in place of their bytes.
struct Model {
    waiting: Waiting,
    dirty: DirtyBitmap,
    /// What the log marked since the last harvest.
    marked: Vec<usize>,
    source: [u32; PAGES],
    destination: [u32; PAGES],
    sent: u64,
}

impl Model {
    fn new() -> Self {
        let half = |guest_address| RegionLayout { guest_address, len_bytes: PAGES as u64 / 2 * 4096 };
        let layout = RamLayout { regions: vec![half(0), half(1 << 32)] };
        let mut dirty = DirtyBitmap::new(&layout);
        dirty.fill();
        let (source, destination) = ([1; PAGES], [0; PAGES]);
        Self { waiting: Waiting::new(&layout), dirty, marked: Vec::new(), source, destination, sent: 0 }
    }

    fn write(&mut self, page: usize) {
        self.source[page] += 1;
        self.marked.push(page);
    }

    fn harvest(&mut self) {
        for page in self.marked.drain(..) {
            let (region, page) = (page / (PAGES / 2), (page % (PAGES / 2)) as u64);
            self.dirty.regions_mut()[region].mark(page..page + 1);
        }
    }

    fn pass(&mut self) {
        for page in 0..PAGES {
            let (region, of_region) = (page / (PAGES / 2), page % (PAGES / 2));
            if self.dirty.regions()[region].words()[of_region / 64] >> (of_region % 64) & 1 == 1 {
                self.destination[page] = self.source[page];
                self.sent += 1;
            }
        }
    }

    fn round(&mut self, millis: u64, pages_max: u64, written: &[usize]) {
        self.waiting.leave_out(&mut self.dirty);
        self.pass();
        written.iter().for_each(|&page| self.write(page));
        self.dirty.clear();
        self.harvest();
        self.waiting.harvested(&mut self.dirty);
        let bounds = WaitingBounds { pages_max, pages_per_second: PAGES_PER_SECOND };
        self.waiting.round_ended(&self.dirty, Duration::from_millis(millis), bounds);
        assert!(self.waiting.pages().count() <= pages_max);
        assert_eq!(self.waiting.pages().common(&self.dirty), self.waiting.pages().count(), "all are dirty");
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { page } => self.write(page),
            Step::Round { millis, pages_max, written } => self.round(millis, pages_max, &[written]),
            Step::BeginAnew => {
                self.waiting.begin_anew();
                self.dirty.fill();
            }
        }
    }

    /// The last round; returns how many pages differ at the destination.
    fn switch(mut self) -> usize {
        self.harvest();
        self.pass();
        self.source.iter().zip(&self.destination).filter(|(ours, theirs)| ours != theirs).count()
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Some pages are hot.
    let page = || prop_oneof![3 => 0..8usize, 1 => 0..PAGES];
    let round = (0..20u64, prop_oneof![Just(0), 1..12u64, Just(1000)], page());
    let step = prop_oneof![
        6 => page().prop_map(|page| Step::Write { page }),
        4 => round.prop_map(|(millis, pages_max, written)| Step::Round { millis, pages_max, written }),
        1 => Just(Step::BeginAnew),
    ];
    prop::collection::vec(step, 0..60)
}

#[test]
fn the_share_of_pages_that_are_written_in_each_round_is_counted_by_the_smaller_of_two() {
    let mut model = Model::new();
    let mut share = |written: std::ops::Range<usize>| {
        written.for_each(|page| model.write(page));
        model.dirty.clear();
        model.harvest();
        model.waiting.harvested(&mut model.dirty);
        let bounds = WaitingBounds { pages_max: 0, pages_per_second: PAGES_PER_SECOND };
        model.waiting.round_ended(&model.dirty, Duration::from_millis(1), bounds)
    };
    let shares = [0..100, 10..110, 20..40, 10..110, 150..200, 0..0].map(&mut share);
    assert_eq!(shares, [None, Some(90), Some(100), Some(100), Some(0), None]);
}

proptest! {
    #[test]
    fn whatever_waits_every_page_arrives_as_the_guest_wrote_it_last(steps in steps()) {
        let mut model = Model::new();
        steps.into_iter().for_each(|step| model.step(step));
        prop_assert_eq!(model.switch(), 0);
    }
}

/// Ten pages are written in each round, and others now and then.
fn hot(model: &mut Model, rounds: usize, millis: u64) {
    for round in 0..rounds {
        let written: Vec<_> = (0..10).chain([50 + round % 40]).collect();
        model.round(millis, 20, &written);
    }
}

#[test]
fn hot_pages_are_sent_twice_and_then_wait() {
    let mut model = Model::new();
    hot(&mut model, 20, 200);
    assert_eq!(model.waiting.pages().count(), 10);
    // All, then the hot ones once more, and one other page a round.
    assert_eq!(model.sent, PAGES as u64 + 10 + 19);
    assert_eq!(model.switch(), 0);
}

#[test]
fn a_waiting_page_that_is_forgotten_is_found() {
    let mut model = Model::new();
    model.waiting.forgets = true;
    hot(&mut model, 3, 200);
    // Not written in the last round, in which they waited.
    model.round(200, 20, &[150]);
    assert_eq!(model.switch(), 10);
}

#[test]
fn pages_that_are_not_written_for_as_long_as_they_take_to_send_wait_no_longer() {
    let mut model = Model::new();
    hot(&mut model, 3, 200);
    let sent = model.sent;
    for _ in 0..3 {
        // Ten pages take 10 ms.
        model.round(3, 20, &[0]);
        assert_eq!(model.waiting.pages().count(), 10, "it is too early to tell");
    }
    model.round(3, 20, &[0]);
    assert_eq!(model.waiting.pages().count(), 1);
    model.round(3, 20, &[0]);
    assert!((9..12).contains(&(model.sent - sent)), "{}", model.sent - sent);
    assert_eq!(model.switch(), 0);
}

#[test]
fn more_hot_pages_than_the_limit_allows_are_sent_in_each_round() {
    let mut model = Model::new();
    hot(&mut model, 3, 200);
    model.round(200, 9, &[]);
    assert_eq!(model.waiting.pages().count(), 0);
}

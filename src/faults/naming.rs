//! A VMM that names the pages to send, bit by bit, and may pause its guest by itself.

use std::fmt;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::guest::{REWRITTEN_PAGES, TestLog};
use super::{Faults, Scene, Watch};
use crate::dirty::{CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty};
use crate::poison::IgnorePoison;
use crate::progress::Event;
use crate::source::{GuestIs, MigrationFailure};

/// How a VMM names pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Naming {
    /// In how many parts it names all of RAM at first.
    pub(super) parts: u64,
    /// The round at the end of which it pauses the guest by itself.
    pub(super) pauses_in_round: Option<u64>,
    /// How long it takes until it has named a part.
    pub(super) takes: Duration,
}

/// The log of such a VMM.
pub(super) struct NamingLog {
    log: TestLog,
    naming: Naming,
    pause: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many parts of RAM have been named.
    named: u64,
    /// How many rounds have ended.
    rounds: u64,
    paused: Option<Instant>,
}

impl NamingLog {
    pub(super) fn new(log: TestLog, naming: Naming, pause: Box<dyn Fn() + Send + Sync>) -> Self {
        Self { log, naming, pause, state: Mutex::default() }
    }
}

impl fmt::Debug for NamingLog {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("NamingLog").field("state", &self.state).finish_non_exhaustive()
    }
}

impl DirtyLog for NamingLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        *self.state.lock().ignore_poison() = State::default();
        self.log.start()?;
        Ok(InitiallyDirty::AsNamed)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        let mut state = self.state.lock().ignore_poison();
        if let Some(since) = state.paused {
            return Ok(CaughtUp::Paused { since });
        }
        thread::sleep(self.naming.takes);
        if state.named < self.naming.parts {
            state.named += 1;
            return Ok(CaughtUp::Partly);
        }
        state.rounds += 1;
        self.log.catch_up()?;
        if self.naming.pauses_in_round != Some(state.rounds) {
            return Ok(CaughtUp::Fully { unnamed_pages: 0 });
        }
        (self.pause)();
        let since = Instant::now();
        state.paused = Some(since);
        Ok(CaughtUp::Paused { since })
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        let state = self.state.lock().ignore_poison();
        if state.rounds == 0 && state.named > 0 {
            let of_part = |&page: &u64| page % self.naming.parts == state.named - 1;
            (0..dirty.pages()).filter(of_part).for_each(|page| dirty.mark(page..page + 1));
        }
        self.log.harvest(region, dirty)
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        self.log.clear(region, first_page, bits)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.log.stop()
    }
}

fn scene(naming: Naming) -> Scene {
    let scene = Scene::new();
    scene.guest.seen.name_pages(naming);
    scene
}

#[test]
fn a_guest_whose_pages_are_named_in_parts_moves_with_all_of_them_in_its_first_round() {
    let scene = scene(Naming { parts: 3, pauses_in_round: None, takes: Duration::ZERO });
    let report = scene.moved(scene.attempt(&Faults::default(), |_| {}));
    // Each page of the two regions was named once, and only pages that the guest wrote meanwhile again.
    assert!((2048..4096).contains(&report.rounds[0].pages), "{:?}", report.rounds[0]);
    assert_eq!(report.pages_zero, 0);
    assert!(report.rounds.len() < 10, "a part is no round: {:?}", report.rounds);
}

#[test]
fn the_time_in_which_a_vmm_names_pages_is_a_part_of_the_predicted_downtime() {
    let takes = Duration::from_millis(60);
    let scene = scene(Naming { parts: 2, pauses_in_round: None, takes });
    let predicted = Mutex::new(None);
    let report = scene.moved(scene.attempt(&Faults::default(), |event| {
        let Event::Round { number, predicted_downtime_ms, .. } = event else { return };
        if *number == 2 {
            *predicted.lock().ignore_poison() = *predicted_downtime_ms;
        }
        if !scene.guest.is_paused() {
            scene.guest.writes_on();
        }
    }));
    // What is left after the second round is what was named in it.
    let predicted = predicted.into_inner().ignore_poison();
    assert!(predicted.is_some_and(|ms| ms >= 60.0), "{predicted:?} {:?}", report.rounds);
}

#[test]
fn a_guest_that_its_vmm_pauses_by_itself_moves_without_another_round() {
    for round in [1, 2] {
        let scene = scene(Naming { parts: 2, pauses_in_round: Some(round), takes: Duration::ZERO });
        let faults = Faults::default();
        let options = &scene.options;
        // A limit that no switch meets: only the pause can end the rounds.
        options.limits.change(|limits| limits.downtime = std::time::Duration::ZERO);
        let report = scene.moved(scene.attempt_by(&faults, options, &Watch(|_: &Event| {})));
        let rounds = u64::try_from(report.rounds.len()).unwrap();
        assert_eq!(rounds, round + 1, "the last is that of the pause: {:?}", report.rounds);
    }
}

#[test]
fn pages_that_are_named_at_the_pause_and_again_are_sent_once() {
    let scene = scene(Naming { parts: 2, pauses_in_round: None, takes: Duration::ZERO });
    scene.guest.seen.rewrite();
    let report = scene.moved(scene.attempt(&Faults::default(), |_| {}));
    let last = report.rounds.last().expect("it has rounds");
    let rewritten = REWRITTEN_PAGES.end - REWRITTEN_PAGES.start;
    assert!((rewritten..rewritten + 200).contains(&last.pages), "{last:?}");
}

#[test]
fn a_guest_that_its_vmm_has_paused_is_resumed_when_the_migration_fails() {
    let scene = scene(Naming { parts: 2, pauses_in_round: Some(1), takes: Duration::ZERO });
    let cancel = scene.options.cancel.clone();
    let watch = Watch(|event: &Event| {
        if matches!(event, Event::Round { .. }) {
            assert!(scene.guest.is_paused());
            cancel.cancel();
        }
    });
    let outcome = scene.attempt_by(&Faults::default(), &scene.options, &watch);
    let error = outcome.source.expect_err("the migration was cancelled");
    assert_eq!(error.guest, GuestIs::RunningAtSource, "{error}");
    assert!(matches!(error.cause, MigrationFailure::Cancelled), "{error}");
    assert!(!scene.guest.is_paused());
    scene.guest.writes_on();
}

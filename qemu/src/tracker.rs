//! How far a source QEMU has come, as its stream and its events tell: for the threads that read the stream,
//! which wait while too much is unsent, and for the engine, which waits for pages.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::named_pages::NamedPages;
use crate::names::{Content, PageNames, SharedBlock};

/// The state of one migration out of QEMU.
///
/// QEMU works in *passes*: it collects the dirty bits of all of RAM, and then names the pages. Reading is
/// held back while more is named and unsent than the link carries in a moment. So QEMU passes over RAM no
/// faster than the link, and when it pauses the guest by itself, because next to nothing is left, not much is
/// unsent.
#[derive(Debug)]
pub struct Tracker {
    pages: NamedPages,
    state: Mutex<State>,
    changed: Condvar,
    /// Reading is held back while more bytes than this are named and unsent.
    held_above_bytes: AtomicU64,
    /// Reading is not held back any more: QEMU is to end.
    open: AtomicBool,
    /// How many callers want QEMU to pass over RAM at full speed.
    reading_on: AtomicUsize,
    /// How long the link is to need for what is named and unsent.
    hold: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// The latest pass that began, from 1.
    pass: u64,
    /// How many pages QEMU found dirty at its beginning.
    pass_pages: u64,
    /// The latest pass whose beginning the engine knows.
    known_pass: u64,
    paused: Option<Instant>,
    /// When QEMU had named the last page.
    all_named: Option<Instant>,
    /// QEMU has sent its state.
    completed: bool,
    failure: Option<String>,
    /// The previous call of `catch_up` returned then, with this much to be sent.
    sending: Option<(Instant, u64)>,
    /// Bytes a second that the engine took.
    rate: Option<f64>,
}

/// A point that a migration of QEMU comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Milestone {
    /// The guest is paused, and QEMU waits.
    Paused,
    /// QEMU has sent its state.
    Completed,
}

/// How much has been named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// A pass has ended: all is named that was dirty at its beginning. QEMU found so many dirty pages since,
    /// and has begun to name them.
    PassEnded {
        /// The number of pages.
        found_pages: u64,
    },
    /// A pass is under way.
    Partly,
    /// QEMU has paused the guest. It names the last pages when it saves the guest.
    Paused {
        /// Since when.
        since: Instant,
    },
}

/// Why the stream is not read any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl Tracker {
    /// For these blocks; `hold` is the time in which the link is to carry what is named and unsent.
    #[must_use]
    pub fn new(blocks: &[SharedBlock], hold: Duration) -> Self {
        Self {
            pages: NamedPages::new(blocks),
            state: Mutex::default(),
            changed: Condvar::new(),
            held_above_bytes: AtomicU64::new(HELD_ABOVE_FIRST),
            open: AtomicBool::new(false),
            reading_on: AtomicUsize::new(0),
            hold,
        }
    }

    /// The named pages.
    #[must_use]
    pub fn pages(&self) -> &NamedPages {
        &self.pages
    }

    /// QEMU began a pass when so many pages had been named, and has said since how many remain to be named.
    /// Those named in between were dirty at its beginning too.
    pub(crate) fn pass_found(&self, pass: u64, named_before: u64, remaining_pages: u64) {
        let since = self.pages.count_named().saturating_sub(named_before);
        self.pass_began(pass, remaining_pages.saturating_add(since));
    }

    /// QEMU began a pass, in which it found so many dirty pages.
    pub fn pass_began(&self, pass: u64, pages: u64) {
        let mut state = self.state();
        if pass > state.pass {
            (state.pass, state.pass_pages) = (pass, pages);
            self.changed.notify_all();
        }
    }

    /// The guest is paused. Reading is not held back from now on: QEMU answers no command while it cannot
    /// write its last pages.
    pub fn paused(&self, since: Instant) {
        self.state().paused.get_or_insert(since);
        self.open();
    }

    /// QEMU has named the last page.
    pub(crate) fn named_all(&self) {
        self.state().all_named.get_or_insert_with(Instant::now);
    }

    /// When QEMU had named the last page.
    pub(crate) fn all_named(&self) -> Option<Instant> {
        self.state().all_named
    }

    /// QEMU has sent its state.
    pub(crate) fn completed(&self) {
        self.state().completed = true;
        self.changed.notify_all();
    }

    /// Waits until an event has reported this milestone, or a failure; for so long at most. Answers whether
    /// the milestone is reached.
    pub(crate) fn await_milestone(&self, milestone: Milestone, longest: Duration) -> bool {
        let reached = |state: &State| match milestone {
            Milestone::Paused => state.paused.is_some(),
            Milestone::Completed => state.completed,
        };
        let waits = |state: &mut State| !reached(state) && state.failure.is_none();
        let waited = self.changed.wait_timeout_while(self.state(), longest, waits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        reached(&state)
    }

    /// Ends holding back.
    pub fn open(&self) {
        self.open.store(true, Ordering::Release);
        let _state = self.state();
        self.changed.notify_all();
    }

    /// Ends holding back for as long as the value lives.
    pub(crate) fn read_on(&self) -> ReadOn<'_> {
        self.reading_on.fetch_add(1, Ordering::AcqRel);
        let _state = self.state();
        self.changed.notify_all();
        ReadOn(self)
    }

    /// Whether QEMU has paused the guest.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused_since().is_some()
    }

    /// Since when QEMU has paused the guest.
    pub(crate) fn paused_since(&self) -> Option<Instant> {
        self.state().paused
    }

    /// The stream broke, for this reason; the first one counts.
    pub fn fail(&self, reason: impl Into<String>) {
        self.state().failure.get_or_insert_with(|| reason.into());
        self.open();
    }

    /// Why the stream broke, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Waits while too much is named and unsent.
    pub fn wait_while_full(&self) {
        let full = || {
            !self.open.load(Ordering::Acquire)
                && self.reading_on.load(Ordering::Acquire) == 0
                && self.pages.marked_bytes() > self.held_above_bytes.load(Ordering::Relaxed)
        };
        if !full() {
            return;
        }
        let mut state = self.state();
        // Engines that wait for pages.
        self.changed.notify_all();
        while full() {
            state = self.changed.wait_timeout(state, LOOKS_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until enough pages are named to send meanwhile, or a pass has ended, or the guest is paused; for
    /// a moment at most.
    ///
    /// # Errors
    /// [`Failed`] if the stream broke.
    pub fn catch_up(&self) -> Result<Naming, Failed> {
        let deadline = Instant::now() + WAITS_MAX;
        let mut state = self.state();
        self.measure(&mut state);
        loop {
            if let Some(reason) = &state.failure {
                return Err(Failed(reason.clone()));
            }
            let naming = match (state.paused, state.pass > state.known_pass.max(1)) {
                (Some(since), _) => Some(Naming::Paused { since }),
                (None, true) => {
                    state.known_pass = state.pass;
                    Some(Naming::PassEnded { found_pages: state.pass_pages })
                }
                (None, false) => None,
            };
            let marked_bytes = self.pages.marked_bytes();
            let enough = marked_bytes >= self.held_above_bytes.load(Ordering::Relaxed) / 2;
            let left = deadline.saturating_duration_since(Instant::now());
            if naming.is_some() || enough || left.is_zero() {
                state.sending = Some((Instant::now(), marked_bytes));
                return Ok(naming.unwrap_or(Naming::Partly));
            }
            let wait = left.min(LOOKS_EVERY);
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Adapts the hold to the rate at which the engine sent what it took last.
    fn measure(&self, state: &mut State) {
        let Some((since, bytes)) = state.sending.take().filter(|&(_, bytes)| bytes >= MEASURED_MIN) else {
            return;
        };
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = bytes as f64 / since.elapsed().as_secs_f64().max(1e-6);
        let rate = state.rate.map_or(rate, |before| (3.0 * before + rate) / 4.0);
        state.rate = Some(rate);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let held = (rate * self.hold.as_secs_f64()).clamp(HELD_ABOVE_MIN, HELD_ABOVE_MAX) as u64;
        self.held_above_bytes.store(held, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageNames for Tracker {
    fn named(&self, block: usize, page: u64, content: Content) {
        self.pages.named(block, page, content);
    }
}

/// Reading is not held back while this exists.
#[derive(Debug)]
pub(crate) struct ReadOn<'tracker>(&'tracker Tracker);

impl Drop for ReadOn<'_> {
    fn drop(&mut self) {
        self.0.reading_on.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The hold before the link's rate is known, in bytes: if QEMU pauses a small guest by itself, not much is
/// unsent even on a slow link.
const HELD_ABOVE_FIRST: u64 = 4 << 20;

/// The least and the most that may be named and unsent.
const HELD_ABOVE_MIN: f64 = (4 << 20) as f64;
const HELD_ABOVE_MAX: f64 = (1 << 30) as f64;

/// Fewer bytes than this are sent in a time that fences and messages decide.
const MEASURED_MIN: u64 = 1 << 20;

/// How often a waiting thread looks at the count of pages, which changes without a notice.
const LOOKS_EVERY: Duration = Duration::from_millis(2);

/// How long the engine waits for pages before it looks at its own limits.
const WAITS_MAX: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn tracker(pages: u64) -> Tracker {
        Tracker::new(
            &[SharedBlock { name: "mem".into(), len_bytes: pages * 4096 }],
            Duration::from_millis(100),
        )
    }

    fn name(tracker: &Tracker, pages: std::ops::Range<u64>) {
        pages.for_each(|page| tracker.named(0, page, Content::Bytes));
    }

    #[test]
    fn the_first_pass_ends_when_the_second_begins() {
        let tracker = tracker(1000);
        tracker.pass_began(1, 1000);
        assert_eq!(tracker.catch_up().unwrap(), Naming::Partly);
        tracker.pass_began(2, 7);
        assert_eq!(tracker.catch_up().unwrap(), Naming::PassEnded { found_pages: 7 });
        assert_eq!(tracker.catch_up().unwrap(), Naming::Partly, "a pass ends once");
    }

    #[test]
    fn what_qemu_named_before_it_said_how_much_remains_was_found_too() {
        let tracker = tracker(1000);
        name(&tracker, 0..100);
        let before = tracker.pages().count_named();
        name(&tracker, 200..230);
        tracker.pages().take(0, 0..usize::MAX, |_, _| {});
        name(&tracker, 230..240);
        tracker.pass_found(2, before, 7);
        assert_eq!(tracker.catch_up().unwrap(), Naming::PassEnded { found_pages: 47 });
    }

    #[test]
    fn a_guest_that_qemu_paused_is_reported_each_time_and_before_a_pass() {
        let tracker = tracker(1000);
        tracker.pass_began(2, 0);
        let since = Instant::now();
        tracker.paused(since);
        tracker.paused(since + Duration::from_secs(1));
        assert_eq!(tracker.catch_up().unwrap(), Naming::Paused { since });
        assert_eq!(tracker.catch_up().unwrap(), Naming::Paused { since });
    }

    #[test]
    fn a_reader_is_held_back_until_pages_are_taken() {
        let pages = 2 * HELD_ABOVE_FIRST / 4096;
        let tracker = tracker(pages);
        name(&tracker, 0..pages);
        thread::scope(|scope| {
            let reader = scope.spawn(|| tracker.wait_while_full());
            assert_eq!(tracker.catch_up().unwrap(), Naming::Partly);
            assert!(!reader.is_finished());
            tracker.pages().take(0, 0..usize::MAX, |_, _| {});
            reader.join().unwrap();
        });
        name(&tracker, 0..pages);
        tracker.paused(Instant::now());
        tracker.wait_while_full();
    }

    #[test]
    fn a_failure_ends_all_waits_and_keeps_its_first_reason() {
        let pages = 2 * HELD_ABOVE_FIRST / 4096;
        let tracker = tracker(pages);
        name(&tracker, 0..pages);
        tracker.fail("the stream is short");
        tracker.fail("closed");
        tracker.wait_while_full();
        assert_eq!(tracker.catch_up(), Err(Failed("the stream is short".into())));
    }
}

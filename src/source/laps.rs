//! A clock for consecutive steps.

use std::time::{Duration, Instant};

/// The durations of steps without a gap between them.
pub(super) struct Laps {
    began: Instant,
    last: Instant,
}

impl Laps {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { began: now, last: now }
    }

    /// The time since the last lap.
    pub(super) fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.last, now)
    }

    /// The time of all laps.
    pub(super) fn total(&self) -> Duration {
        self.last - self.began
    }
}

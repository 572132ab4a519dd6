//! A clock for consecutive steps.

use std::time::{Duration, Instant};

/// The durations of steps without a gap between them.
pub(super) struct Laps {
    began: Instant,
    last: Instant,
}

impl Laps {
    /// The first step began then.
    pub(super) fn since(began: Instant) -> Self {
        Self { began, last: began }
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

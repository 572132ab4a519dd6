//! What a migration has taken from the guest so far.

use std::time::Duration;

use super::history::History;
use super::lost::Lost;
use super::round::Round;

impl History {
    /// How much of the guest's time the migration has taken so far, as far as that was measured.
    #[must_use]
    pub fn lost(&self) -> Lost {
        self.rounds().iter().map(Round::lost).fold(Lost::default(), |sum, lost| Lost {
            downtime: Duration::ZERO,
            throttling: sum.throttling + lost.throttling,
            tracking: sum.tracking + lost.tracking,
        })
    }

    /// The share of the guest's time that recording its writes takes, by the latest rounds; `None` without
    /// heartbeats.
    #[must_use]
    pub fn tracking_share(&self) -> Option<f64> {
        let measured = self.rounds().iter().rev().filter_map(|round| Some((round.tracking?, round.duration)));
        let (lost, time) = measured
            .take(3)
            .fold((Duration::ZERO, Duration::ZERO), |sum, (lost, time)| (sum.0 + lost, sum.1 + time));
        (!time.is_zero()).then(|| lost.as_secs_f64() / time.as_secs_f64())
    }
}

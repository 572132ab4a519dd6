//! Throttling the guest, and how much of its time that took.

use std::time::{Duration, Instant};

use super::migration::Migration;
use crate::panics::{Panicked, caught};
use crate::progress::Event;

/// Throttles the guest by this many percent; returns whether the VMM did so.
pub(super) fn throttle(Migration { guest, observer, .. }: Migration<'_>, percent: u8) -> bool {
    let why = match caught(|| guest.throttle(percent)) {
        Ok(Ok(())) => {
            observer.event(&Event::Throttled { percent });
            return true;
        }
        Ok(Err(error)) => error.to_string(),
        Err(Panicked(text)) => format!("the VMM panicked: {text}"),
    };
    tracing::warn!("the guest cannot be throttled to {percent} %: {why}");
    false
}

/// The time that throttling takes from the guest, from the first percent to the pause.
#[derive(Debug, Default)]
pub(super) struct ThrottleMeter {
    lost: Duration,
    /// The present throttle, in percent, and its beginning.
    now: Option<(u8, Instant)>,
}

impl ThrottleMeter {
    /// The guest is slowed by so many percent from now on; 0 also when it is paused.
    pub(super) fn set(&mut self, percent: u8) {
        self.lost = self.lost();
        self.now = (percent > 0).then(|| (percent, Instant::now()));
    }

    /// The time lost so far.
    pub(super) fn lost(&self) -> Duration {
        let now = self.now.map(|(percent, since)| since.elapsed().mul_f64(f64::from(percent) / 100.0));
        self.lost + now.unwrap_or_default()
    }
}

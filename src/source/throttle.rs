//! Throttling the guest, and how much of its time that took.

use std::time::{Duration, Instant};

use super::migration::Migration;
use super::quota::{WriteLimit, limit};
use crate::panics::{Panicked, caught};
use crate::progress::Event;

/// What slows the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Throttle {
    /// All of its vCPUs have a share of the time.
    Time,
    /// Each vCPU has a quota of writes.
    Writes(WriteLimit),
}

/// Throttles the guest by this many percent: by a limit of its writes if one is given and the VMM sets it,
/// else by a share of its time. Returns which, or `None` if the VMM does neither.
pub(super) fn throttle(
    migration: Migration<'_>,
    percent: u8,
    writes: Option<WriteLimit>,
) -> Option<Throttle> {
    let Migration { guest, observer, .. } = migration;
    if let Some(writes) = writes.filter(|_| percent > 0) {
        match limit(guest, Some(writes)) {
            Ok(()) => {
                observer.event(&Event::Throttled { percent, write_limit_mbps: Some(writes.mbps()) });
                return Some(Throttle::Writes(writes));
            }
            Err(why) => tracing::warn!("the guest's writes cannot be limited, only its time: {why}"),
        }
    }
    if let Err(why) = limit(guest, None) {
        tracing::warn!("the guest's writes may stay limited: {why}");
    }
    let why = match caught(|| guest.throttle(percent)) {
        Ok(Ok(())) => {
            observer.event(&Event::Throttled { percent, write_limit_mbps: None });
            return Some(Throttle::Time);
        }
        Ok(Err(error)) => error.to_string(),
        Err(Panicked(text)) => format!("the VMM panicked: {text}"),
    };
    tracing::warn!("the guest cannot be throttled to {percent} %: {why}");
    None
}

/// The time that throttling takes from the guest, from the first percent to the pause.
#[derive(Debug, Default)]
pub(super) struct ThrottleMeter {
    lost: Duration,
    /// The share of the guest's time that it loses at present, and the beginning.
    now: Option<(f64, Instant)>,
}

impl ThrottleMeter {
    /// The guest loses this share of its time from now on; 0 also when it is paused, or when what it loses is
    /// [measured](Self::measured).
    pub(super) fn set(&mut self, share: f64) {
        self.lost = self.lost();
        self.now = (share > 0.0).then(|| (share, Instant::now()));
    }

    /// The guest has lost so much more.
    pub(super) fn measured(&mut self, lost: Duration) {
        self.lost += lost;
    }

    /// The time lost so far.
    pub(super) fn lost(&self) -> Duration {
        let now = self.now.map(|(share, since)| since.elapsed().mul_f64(share));
        self.lost + now.unwrap_or_default()
    }
}

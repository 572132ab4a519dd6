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

/// By how much the guest is slowed in a round, whatever slows it.
#[derive(Debug)]
pub(super) struct Slowing {
    percent: u8,
    round_began: Instant,
    /// When the percentage was last changed in this round, if it was, and the percentages before times the
    /// seconds that each was in force.
    changed: Option<(Instant, f64)>,
}

impl Default for Slowing {
    fn default() -> Self {
        Self { percent: 0, round_began: Instant::now(), changed: None }
    }
}

impl Slowing {
    pub(super) fn begins_round(&mut self) {
        *self = Self { percent: self.percent, ..Self::default() };
    }

    /// By so many percent from now on.
    pub(super) fn set(&mut self, percent: u8) {
        let now = Instant::now();
        let (since, before) = self.changed.unwrap_or((self.round_began, 0.0));
        self.changed = Some((now, before + f64::from(self.percent) * (now - since).as_secs_f64()));
        self.percent = percent;
    }

    /// On average over this round.
    pub(super) fn mean_percent(&self) -> u8 {
        let Some((since, before)) = self.changed else { return self.percent };
        let all = before + f64::from(self.percent) * since.elapsed().as_secs_f64();
        let mean = all / self.round_began.elapsed().as_secs_f64();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 99")]
        let percent = mean.round().clamp(0.0, 99.0) as u8;
        percent
    }
}

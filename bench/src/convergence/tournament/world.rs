//! A migration as it would go: a guest, a link, and what is done.

use std::time::Duration;

use sterna::convergence::{
    DirtySample, Downtime, HandoverCost, History, LaneLoad, Limits, Round, SwitchCost,
};

use super::guest::Guest;
use super::random::Random;

/// A migration under way.
#[derive(Clone, Debug)]
pub(super) struct World<'race> {
    pub(super) guest: &'race Guest,
    /// Bytes a second.
    pub(super) bandwidth: f64,
    pub(super) limits: &'race Limits,
    /// What its rounds have shown.
    pub(super) history: History,
    /// Seconds since the first round began.
    pub(super) now: f64,
    /// Bytes that are dirty, part by part.
    dirty: Vec<f64>,
    first_bytes: f64,
    pub(super) throttle_percent: u8,
    /// Whether the throttle stops only those vCPUs that write.
    pub(super) spares_readers: bool,
    lost: f64,
    pub(super) sent: f64,
    noise: Option<Random>,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    /// Whether the guest moved, within the limits.
    pub(super) moved: bool,
    /// Whether it moved with more downtime than is allowed.
    pub(super) broke_limit: bool,
    /// Seconds that the guest lost.
    pub(super) lost: f64,
    /// Seconds in all.
    pub(super) total: f64,
    pub(super) sent: f64,
}

const ROUND_TRIP: Duration = Duration::from_micros(100);

impl<'race> World<'race> {
    /// Nothing is sent yet. Without a seed, all is exactly as the model says.
    pub(super) fn new(guest: &'race Guest, bandwidth: f64, limits: &'race Limits, seed: Option<u64>) -> Self {
        Self {
            guest,
            bandwidth,
            limits,
            history: History::new(ROUND_TRIP),
            now: 0.0,
            dirty: vec![0.0; guest.parts.len()],
            first_bytes: guest.touched,
            throttle_percent: 0,
            spares_readers: false,
            lost: 0.0,
            sent: 0.0,
            noise: seed.map(Random::new),
        }
    }

    fn running(&self) -> f64 {
        f64::from(100 - self.throttle_percent) / 100.0
    }

    /// About 1.
    fn noise(&mut self, by: f64) -> f64 {
        self.noise.as_mut().map_or(1.0, |random| random.between(1.0 - by, 1.0 + by))
    }

    pub(super) fn dirty_bytes(&self) -> f64 {
        self.first_bytes + self.dirty.iter().sum::<f64>()
    }

    /// Sends what is dirty.
    pub(super) fn round(&mut self) {
        let bytes = self.dirty_bytes();
        let busy = bytes / self.bandwidth * self.noise(0.02) + ROUND_TRIP.as_secs_f64();
        let harvest = self.harvest();
        let (from, to) = (self.now, self.now + busy + OVERHEAD.as_secs_f64() + harvest);
        let running = self.running();
        let is_first = self.history.rounds().is_empty();
        for (index, part) in self.guest.parts.iter().enumerate() {
            let sent = if is_first { part.bytes } else { self.dirty[index] };
            self.dirty[index] = part.left(sent, (from, to), running);
        }
        let noise = self.noise(0.02);
        self.dirty.iter_mut().for_each(|dirty| *dirty *= noise);
        self.first_bytes = 0.0;
        self.now = to;
        self.sent += bytes;
        let time = to - from;
        self.lose(time);
        let tracking = (time * running * self.guest.tracking_share).max(0.0);
        let lane = LaneLoad { bytes: bytes as u64, busy: seconds(busy), fence: ROUND_TRIP };
        self.history.push(Round {
            lanes: vec![lane],
            duration: seconds(busy) + OVERHEAD,
            overhead: OVERHEAD,
            harvest: seconds(harvest),
            dirty_pages: (self.dirty_bytes() / 4096.0) as u64,
            throttle_percent: self.throttle_percent,
            tracking: self.guest.beats.then(|| seconds(tracking)),
            ..Round::default()
        });
    }

    /// Watches what the guest writes.
    pub(super) fn look(&mut self, time: Duration) -> DirtySample {
        let (from, to) = (self.now, self.now + time.as_secs_f64());
        let running = self.running();
        let written: f64 = self.guest.parts.iter().map(|part| part.written(from, to, running)).sum();
        // Nothing that was dirty gets clean, and hot pages are dirty already.
        for (dirty, part) in self.dirty.iter_mut().zip(&self.guest.parts) {
            *dirty += part.written(from, to, running) * (1.0 - (*dirty / part.bytes).min(1.0));
        }
        self.now = to + self.harvest();
        self.lose(self.now - from);
        DirtySample { interval: time, dirty_bytes: written as u64 }
    }

    /// Switches now.
    pub(super) fn switch(&mut self) -> Outcome {
        let downtime = self.predicted().total().as_secs_f64() * self.noise(0.05);
        self.now += downtime;
        self.sent += self.dirty_bytes();
        self.lost += downtime;
        let broke_limit = downtime > self.limits.downtime_relaxed_max().as_secs_f64();
        self.outcome(true, broke_limit)
    }

    pub(super) fn give_up(&self) -> Outcome {
        self.outcome(false, false)
    }

    /// The downtime of a switch now.
    pub(super) fn predicted(&self) -> Downtime {
        let record = Duration::from_millis(1);
        let handover = HandoverCost {
            revoke: Duration::from_millis(2),
            record_here: record,
            record_there: record,
            ..HandoverCost::default()
        };
        Downtime::predicted(&self.history, &SwitchCost::default(), &handover, None).unwrap_or_default()
    }

    pub(super) fn elapsed(&self) -> Duration {
        seconds(self.now)
    }

    /// KVM copies a bit for each page, and this side reads it.
    fn harvest(&self) -> f64 {
        1e-4 + self.guest.touched / 4096.0 / 8.0 / 4e9
    }

    fn lose(&mut self, time: f64) {
        let share = if self.spares_readers { self.guest.writers } else { 1.0 };
        let throttled = f64::from(self.throttle_percent) / 100.0 * share;
        self.lost += time * (throttled + (1.0 - throttled) * self.guest.tracking_share);
    }

    fn outcome(&self, moved: bool, broke_limit: bool) -> Outcome {
        Outcome { moved, broke_limit, lost: self.lost, total: self.now, sent: self.sent }
    }
}

/// What a round takes besides sending.
const OVERHEAD: Duration = Duration::from_micros(500);

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 1e9))
}

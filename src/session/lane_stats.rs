//! A lane with a meter, for one round: what it sent, how long it was sending, and no faster than allowed.

use std::time::{Duration, Instant};

use super::error::SessionError;
use super::send_gate::SendGate;
use crate::convergence::LaneLoad;
use crate::memory::{PAGE_BYTES, PageRun};
use crate::transport::Lane;

/// How long a lane may go on sending what it was given, from its buffers: that of TCP, 4 MiB, lasts so long at 1 Gb/s.
const DRAINED_AFTER: Duration = Duration::from_millis(30);

pub(super) struct LaneWithStats<'round> {
    lane: &'round mut dyn Lane,
    gate: SendGate<'round>,
    meter: Meter,
    /// What the lane had waited in all, before this round.
    waited_before: Duration,
    /// When the stripe began that is being sent; not known if the one before had nothing to send. Clocks are read
    /// once a stripe, and not for one that sends nothing: for each run of pages, or for each hole of a large guest,
    /// it would be felt. Where stripes are only scanned, those with a few pages count as one.
    stripe_began: Option<Instant>,
    stripe_bytes: u64,
    /// With fewer bytes a stripe goes on into the next.
    stripe_bytes_min: u64,
    /// When the first page had been taken.
    first_page: Option<Instant>,
}

impl<'round> LaneWithStats<'round> {
    /// `reads` says whether the round reads pages before it sends them, and so may find nothing to send for long.
    pub(super) fn new(lane: &'round mut dyn Lane, gate: SendGate<'round>, now: Instant, reads: bool) -> Self {
        let waited_before = lane.waited();
        let meter = Meter::new(now);
        Self {
            lane,
            gate,
            meter,
            waited_before,
            stripe_began: Some(now),
            stripe_bytes: 0,
            stripe_bytes_min: if reads { 1 } else { STRIPE_BYTES_MIN },
            first_page: None,
        }
    }

    pub(super) fn write(&mut self, run: PageRun) -> Result<(), SessionError> {
        self.stripe_began.get_or_insert_with(Instant::now);
        match self.gate.pace.portion_bytes() {
            None => self.lane.write(run)?,
            Some(portion_bytes) => {
                for part in run.split(portion_bytes / PAGE_BYTES) {
                    self.gate.pace.take(part.len_bytes(), self.gate.check)?;
                    self.lane.write(part)?;
                }
            }
        }
        self.stripe_bytes += run.len_bytes();
        self.first_page.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// The stripe is done; what comes is the next.
    pub(super) fn end_stripe(&mut self) {
        if self.stripe_bytes == 0 {
            self.stripe_began = None;
        } else if self.stripe_bytes >= self.stripe_bytes_min {
            self.sent();
        }
    }

    /// Adds up what was sent since the stripe began.
    fn sent(&mut self) {
        let Some(began) = self.stripe_began.take().filter(|_| self.stripe_bytes > 0) else { return };
        let now = Instant::now();
        self.meter.sends(began);
        self.meter.sent(now, self.stripe_bytes);
        (self.stripe_began, self.stripe_bytes) = (Some(now), 0);
    }

    /// Closes the round; what the lane did in it, and when its first page had been taken.
    pub(super) fn fence(mut self, round: u32) -> Result<(LaneLoad, Option<Instant>), SessionError> {
        self.sent();
        let began = Instant::now();
        self.meter.sends(began);
        self.lane.fence(round)?;
        let load = self.meter.load(began, Instant::now(), self.lane.waited() - self.waited_before);
        Ok((load, self.first_page))
    }
}

/// Sixteen pages: less time than a lane may be drained for is spent on finding them, and reading the clock twice for
/// each page would take as long as finding it.
const STRIPE_BYTES_MIN: u64 = 16 * PAGE_BYTES;

/// Adds up what a lane sends and the time that it takes.
#[derive(Debug)]
struct Meter {
    began: Instant,
    /// When the lane was last given something.
    last: Instant,
    bytes: u64,
    idle: Duration,
}

impl Meter {
    fn new(now: Instant) -> Self {
        Self { began: now, last: now, bytes: 0, idle: Duration::ZERO }
    }

    /// Something is about to be sent.
    fn sends(&mut self, now: Instant) {
        // Before the first write there is nothing in any buffer.
        let drained_after = if self.bytes == 0 { Duration::ZERO } else { DRAINED_AFTER };
        self.idle += (now - self.last).saturating_sub(drained_after);
    }

    fn sent(&mut self, now: Instant, bytes: u64) {
        self.last = now;
        self.bytes += bytes;
    }

    /// The whole, with a fence that took from `fence_began` to `now`, less what the lane `waited` for others.
    fn load(&self, fence_began: Instant, now: Instant, waited: Duration) -> LaneLoad {
        LaneLoad {
            bytes: self.bytes,
            busy: (now - self.began).saturating_sub(self.idle + waited),
            fence: now - fence_began,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_busy_while_it_sends_or_what_it_sent_may_still_be_leaving() {
        let at = |millis| Duration::from_millis(millis);
        let began = Instant::now();
        let mut meter = Meter::new(began);
        // 50 ms of looking for something to send; 10 ms of sending, 20 ms of looking, 10 ms of sending; 100 ms of looking.
        for (from, to) in [(50, 60), (80, 90)] {
            meter.sends(began + at(from));
            meter.sent(began + at(to), 1000);
        }
        meter.sends(began + at(190));
        let load = meter.load(began + at(190), began + at(195), Duration::ZERO);
        assert_eq!(load, LaneLoad { bytes: 2000, busy: at(10 + 20 + 10 + 30 + 5), fence: at(5) });
        let waited = meter.load(began + at(190), began + at(195), at(9));
        assert_eq!(waited.busy, load.busy - at(9));
    }
}

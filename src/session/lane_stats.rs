//! A lane with statistics for one round: bytes sent and sending time, within the rate limit.

use std::time::{Duration, Instant};

use super::error::SessionError;
use super::send_gate::SendGate;
use crate::convergence::LaneLoad;
use crate::memory::{PAGE_BYTES, PageRun};
use crate::transport::Lane;

/// How long a lane may continue to send from its buffers: TCP's buffer of 4 MiB lasts this long at 1 Gb/s.
const DRAINED_AFTER: Duration = Duration::from_millis(30);

pub(super) struct LaneWithStats<'round> {
    lane: &'round mut dyn Lane,
    gate: SendGate<'round>,
    meter: Meter,
    /// The lane's total waiting time before this round.
    waited_before: Duration,
    /// When the current stripe began; unknown if the stripe before had nothing to send. The clock is read
    /// once a stripe, and not for a stripe without pages to send: reading it for each run of pages, or for
    /// each hole of a large guest, would be measurable. Stripes that are only scanned and have a few pages
    /// count as one.
    stripe_began: Option<Instant>,
    stripe_bytes: u64,
    /// Sent, and not in the pass's progress yet: all lanes count there, so they do it once a stripe.
    uncounted_bytes: u64,
    /// A stripe with fewer bytes continues into the next.
    stripe_bytes_min: u64,
    /// When the lane took the first page.
    first_page: Option<Instant>,
}

impl<'round> LaneWithStats<'round> {
    /// `reads` tells whether the round reads pages before it sends them, and so may find nothing to send for
    /// long.
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
            uncounted_bytes: 0,
            stripe_bytes_min: if reads { 1 } else { STRIPE_BYTES_MIN },
            first_page: None,
        }
    }

    pub(super) fn write(&mut self, run: PageRun) -> Result<(), SessionError> {
        self.stripe_began.get_or_insert_with(Instant::now);
        match self.gate.pace.portion_bytes() {
            None => {
                self.lane.write(run)?;
                self.uncounted_bytes += run.len_bytes();
            }
            Some(portion_bytes) => {
                for part in run.split(portion_bytes / PAGE_BYTES) {
                    self.gate.pace.take(part.len_bytes(), self.gate.check)?;
                    self.lane.write(part)?;
                    // At a low limit a stripe takes seconds.
                    self.uncounted_bytes += part.len_bytes();
                    self.count();
                }
            }
        }
        self.stripe_bytes += run.len_bytes();
        self.first_page.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Ends the stripe; the next one begins.
    pub(super) fn end_stripe(&mut self) {
        self.count();
        if self.stripe_bytes == 0 {
            self.stripe_began = None;
        } else if self.stripe_bytes >= self.stripe_bytes_min {
            self.sent();
        }
    }

    fn count(&mut self) {
        if let Some(progress) = self.gate.progress {
            progress.sent(std::mem::take(&mut self.uncounted_bytes));
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

    /// Closes the round; returns the lane's statistics, and when it took its first page.
    pub(super) fn fence(mut self, round: u32) -> Result<(LaneLoad, Option<Instant>), SessionError> {
        self.sent();
        let began = Instant::now();
        self.meter.sends(began);
        self.lane.fence(round)?;
        let load = self.meter.load(began, Instant::now(), self.lane.waited() - self.waited_before);
        Ok((load, self.first_page))
    }
}

/// Sixteen pages: finding them takes less time than a lane may need to drain, and reading the clock twice for
/// each page would take as long as finding it.
const STRIPE_BYTES_MIN: u64 = 16 * PAGE_BYTES;

/// Adds up a lane's bytes and its sending time.
#[derive(Debug)]
struct Meter {
    began: Instant,
    /// When the lane last received something to send.
    last: Instant,
    bytes: u64,
    idle: Duration,
}

impl Meter {
    fn new(now: Instant) -> Self {
        Self { began: now, last: now, bytes: 0, idle: Duration::ZERO }
    }

    /// A write is about to begin.
    fn sends(&mut self, now: Instant) {
        // Before the first write the buffers are empty.
        let drained_after = if self.bytes == 0 { Duration::ZERO } else { DRAINED_AFTER };
        self.idle += (now - self.last).saturating_sub(drained_after);
    }

    fn sent(&mut self, now: Instant, bytes: u64) {
        self.last = now;
        self.bytes += bytes;
    }

    /// The statistics of the whole, with a fence that took from `fence_began` to `now`, less the time that
    /// the lane `waited` for others.
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
        // 50 ms of searching; 10 ms of sending, 20 ms of searching, 10 ms of sending; 100 ms of searching.
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

//! What is measured in one round.

use std::time::Duration;

use super::lost::{Lost, to_throttling};
use crate::memory::PAGE_BYTES;

/// The work of one lane in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneLoad {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// How long it was sending, including waits for the rate limiter. Excluded is the time in which it waited
    /// for memory to be registered, or scanned pages without finding any to send for so long that its send
    /// queue ran empty.
    pub busy: Duration,
    /// The part of `busy` that the closing fence took: at least one round trip, and the data still in flight.
    pub fence: Duration,
}

/// Measurements of one round while the guest runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Each lane.
    pub lanes: Vec<LaneLoad>,
    /// Time from its first page to the last fence.
    pub duration: Duration,
    /// What sending took besides what the busiest lane was sending or waited for: the start of the
    /// workers, looking for dirty pages, and messages to the destination.
    pub overhead: Duration,
    /// How late its last bytes left by the bandwidth limit, if there is one: a lane overslept.
    pub late: Duration,
    /// How long the harvest after it took.
    pub harvest: Duration,
    /// Pages that were dirty again at its end.
    pub dirty_pages: u64,
    /// Pages among them that waited for the last round meanwhile, instead of being sent.
    pub waited_pages: u64,
    /// Pages among those that were not written again.
    pub unwritten_pages: u64,
    /// Pages that wait from then on: the next round leaves them out.
    pub waiting_pages: u64,
    /// Pages that the VMM named meanwhile, if its log learns of writes by names.
    pub named_pages: u64,
    /// How long nothing was sent meanwhile, because the VMM had not named the next pages yet or one of
    /// several passes ended.
    pub naming: Duration,
    /// How many percent of the pages written meanwhile the guest had written in the round before too; known
    /// only where no look shows how fast it writes.
    pub rewritten_percent: Option<u8>,
    /// How far the guest was slowed meanwhile, in percent.
    pub throttle_percent: u8,
    /// How much of the guest's time recording its writes took, if its heartbeat shows that.
    pub tracking: Option<Duration>,
    /// How much of the guest's time throttling took, where that was measured.
    pub throttling: Option<Duration>,
}

impl Round {
    /// Bytes of pages sent.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.bytes).sum()
    }

    /// Bytes of pages that were dirty at its end.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_pages * PAGE_BYTES
    }

    /// Bytes of pages that the guest wrote meanwhile.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.dirty_pages.saturating_sub(self.unwritten_pages) * PAGE_BYTES
    }

    /// Pages that the next round sends.
    pub(super) fn next_pages(&self) -> u64 {
        self.dirty_pages.saturating_sub(self.waiting_pages)
    }

    /// How long the busiest lane was sending.
    #[must_use]
    pub fn busy(&self) -> Duration {
        self.lanes.iter().map(|lane| lane.busy).max().unwrap_or_default()
    }

    /// Bytes of new pages that the guest wrote each second meanwhile.
    #[must_use]
    pub fn dirty_rate(&self) -> f64 {
        rate(self.written_bytes(), self.duration + self.harvest).unwrap_or(0.0)
    }

    /// Bytes by which more was left each second meanwhile: of pages that were written and did not wait.
    pub(super) fn growth_rate(&self) -> f64 {
        let bytes = self.dirty_pages.saturating_sub(self.waited_pages) * PAGE_BYTES;
        rate(bytes, self.duration + self.harvest).unwrap_or(0.0)
    }

    /// How long the guest ran meanwhile, in seconds.
    pub(super) fn guest_seconds(&self) -> f64 {
        guest_seconds(self.duration + self.harvest, self.throttle_percent)
    }

    /// How much of the guest's time it took, as far as that was measured.
    #[must_use]
    pub fn lost(&self) -> Lost {
        Lost {
            downtime: Duration::ZERO,
            throttling: self
                .throttling
                .unwrap_or_else(|| to_throttling(self.duration + self.harvest, self.throttle_percent)),
            tracking: self.tracking.unwrap_or_default(),
        }
    }
}

/// How long a guest ran in this time, in seconds.
pub(super) fn guest_seconds(time: Duration, throttle_percent: u8) -> f64 {
    time.as_secs_f64() * f64::from(100 - throttle_percent.min(99)) / 100.0
}

/// Bytes a second, if the time is not zero.
pub(super) fn rate(bytes: u64, time: Duration) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let bytes = bytes as f64;
    (bytes > 0.0 && !time.is_zero()).then(|| bytes / time.as_secs_f64())
}

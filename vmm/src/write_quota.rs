//! A quota of pages that each vCPU may write anew in a second.
//!
//! A page counts if it was not marked as written before: a vCPU that writes the same pages again and again
//! uses its quota up only as often as the marks are taken. The quota is kept by time. Each vCPU has a moment
//! at which all of its pages would have been written at exactly the quota, and stands still until then.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::clock::monotonic_ns;
use crate::poison::IgnorePoison;

/// How often a thread looks at the rings while writes are tracked.
pub(crate) const PERIOD: Duration = Duration::from_millis(2);
/// How often it looks whether they are.
pub(crate) const IDLE_PERIOD: Duration = Duration::from_millis(50);

/// What a vCPU did not use of its quota in the past is lost, except for this time.
const AHEAD_NS: u64 = 4_000_000;
/// The longest time that a vCPU stands still at once. A hundred periods: a quota of a hundredth of what it
/// writes at full speed is kept.
const REST_MAX_NS: u64 = 200_000_000;

/// What a vCPU has written, and what the quota took from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuWrites {
    /// Pages written anew since the machine was made, while its writes were tracked.
    pub pages: u64,
    /// How long the vCPU stood still because of a quota.
    pub stood_still: Duration,
}

/// The quota, the same for each vCPU.
#[derive(Debug)]
pub(crate) struct WriteQuota {
    pages_per_second: Mutex<Option<NonZeroU64>>,
    vcpus: Vec<Vcpu>,
}

/// Times are in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Default)]
struct Vcpu {
    pages: AtomicU64,
    stood_ns: AtomicU64,
    /// Since when it stands still; 0 if it runs.
    since_ns: AtomicU64,
    /// Until when it stands still.
    due_ns: AtomicU64,
}

impl WriteQuota {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self { pages_per_second: Mutex::default(), vcpus: (0..vcpus).map(|_| Vcpu::default()).collect() }
    }

    /// Sets the quota, or ends it.
    pub(crate) fn set(&self, pages_per_second: Option<NonZeroU64>) {
        let mut now = self.lock();
        *now = pages_per_second;
        self.vcpus.iter().for_each(|vcpu| vcpu.due_ns.store(0, Ordering::Relaxed));
    }

    pub(crate) fn pages_per_second(&self) -> Option<NonZeroU64> {
        *self.lock()
    }

    /// How many pages a vCPU may list before they have to be counted; `None` without a quota.
    pub(crate) fn uncounted_max(&self) -> Option<usize> {
        let pages = u128::from(self.pages_per_second()?.get()) * u128::from(AHEAD_NS) / 1_000_000_000;
        Some(usize::try_from(pages).unwrap_or(usize::MAX).max(1))
    }

    /// Counts pages that a vCPU has written anew.
    pub(crate) fn charge(&self, vcpu: usize, pages: u64) {
        let Some(vcpu) = self.vcpus.get(vcpu).filter(|_| pages > 0) else { return };
        vcpu.pages.fetch_add(pages, Ordering::Relaxed);
        let quota = self.lock();
        if let Some(rate) = *quota {
            let due = vcpu.due_ns.load(Ordering::Relaxed);
            vcpu.due_ns.store(due_after(due, monotonic_ns(), pages, rate), Ordering::Relaxed);
        }
    }

    /// Until when a vCPU has to stand still; in the past if it may run.
    pub(crate) fn due_ns(&self, vcpu: usize) -> u64 {
        self.vcpus.get(vcpu).map_or(0, |vcpu| vcpu.due_ns.load(Ordering::Relaxed))
    }

    /// The vCPUs that have to stand still.
    pub(crate) fn over(&self) -> impl Iterator<Item = usize> {
        let now = monotonic_ns();
        (0..self.vcpus.len()).filter(move |&vcpu| self.due_ns(vcpu) > now)
    }

    /// Has a vCPU stand still for as long as `rest` takes.
    pub(crate) fn stand_still(&self, vcpu: usize, rest: impl FnOnce()) {
        let Some(vcpu) = self.vcpus.get(vcpu) else { return };
        let began = monotonic_ns();
        vcpu.since_ns.store(began, Ordering::Relaxed);
        rest();
        vcpu.since_ns.store(0, Ordering::Relaxed);
        vcpu.stood_ns.fetch_add(monotonic_ns().saturating_sub(began), Ordering::Relaxed);
    }

    pub(crate) fn writes(&self) -> Vec<VcpuWrites> {
        let of = |vcpu: &Vcpu| {
            let rests = match vcpu.since_ns.load(Ordering::Relaxed) {
                0 => 0,
                since => monotonic_ns().saturating_sub(since),
            };
            VcpuWrites {
                pages: vcpu.pages.load(Ordering::Relaxed),
                stood_still: Duration::from_nanos(vcpu.stood_ns.load(Ordering::Relaxed) + rests),
            }
        };
        self.vcpus.iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Option<NonZeroU64>> {
        self.pages_per_second.lock().ignore_poison()
    }
}

/// When the next page may be written, after so many were.
fn due_after(due: u64, now: u64, pages: u64, pages_per_second: NonZeroU64) -> u64 {
    let spent = u128::from(pages) * 1_000_000_000 / u128::from(pages_per_second.get());
    let spent = u64::try_from(spent).unwrap_or(u64::MAX);
    let due = due.max(now.saturating_sub(AHEAD_NS)).saturating_add(spent);
    due.min(now.saturating_add(REST_MAX_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// How many pages a vCPU writes in two seconds that writes `fast` pages a second if it may.
    fn written(fast: u64, quota: u64) -> u64 {
        let (mut now, mut due, mut pages) = (SECOND, 0, 0);
        let period = u64::try_from(PERIOD.as_nanos()).unwrap();
        while now < 3 * SECOND {
            let more = fast * period / SECOND;
            now += period;
            pages += more;
            due = due_after(due, now, more, NonZeroU64::new(quota).unwrap());
            now = now.max(due);
        }
        pages
    }

    #[test]
    fn a_vcpu_writes_its_quota_and_hardly_more() {
        for (fast, quota) in [(100_000, 50_000), (100_000, 5000), (100_000, 1100), (10_000, 9900)] {
            let pages = written(fast, quota);
            // What it writes in a period comes on top, because its writes are seen only afterwards.
            let most = quota * 2 + quota * AHEAD_NS / SECOND + fast * 2 / 500;
            assert!(pages >= quota * 2 && pages <= most, "{pages} pages at {quota} of {fast} a second");
        }
        assert!(written(1000, 50_000) >= 1990, "one that writes less than its quota is left alone");
    }

    #[test]
    fn a_quota_that_is_ended_lets_a_vcpu_run_at_once() {
        let quota = WriteQuota::new(2);
        quota.set(NonZeroU64::new(10));
        quota.charge(1, 100);
        assert_eq!(quota.over().collect::<Vec<_>>(), [1]);
        quota.set(None);
        assert_eq!(quota.over().count(), 0);
        quota.charge(1, 100);
        assert_eq!(quota.over().count(), 0);
        assert_eq!(quota.writes().iter().map(|vcpu| vcpu.pages).collect::<Vec<_>>(), [0, 200]);
    }
}

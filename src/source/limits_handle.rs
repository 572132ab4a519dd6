//! The limits of a migration, changeable while it runs, and the pace that one of them sets.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::MigrationFailure;
use crate::convergence::{Bucket, Limits};

/// The limits of a migration, to be kept by whoever may change them while it runs. The bandwidth limit takes effect at once,
/// the timeout within a stripe, everything else after the round that is being sent.
#[derive(Clone, Debug, Default)]
pub struct LimitsHandle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    limits: Mutex<Limits>,
    pace: RateLimiter,
}

impl LimitsHandle {
    /// These limits to begin with.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let pace = RateLimiter::default();
        pace.set(limits.bandwidth_max);
        Self(Arc::new(Shared { limits: Mutex::new(limits), pace }))
    }

    /// The limits now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.lock().clone()
    }

    /// Changes them; returns what they are then.
    pub fn change(&self, change: impl FnOnce(&mut Limits)) -> Limits {
        let mut limits = self.lock();
        change(&mut limits);
        self.0.pace.set(limits.bandwidth_max);
        limits.clone()
    }

    pub(crate) fn pace(&self) -> &RateLimiter {
        &self.0.pace
    }

    /// Whether a migration that began at `started` has used up its time, and nothing remains to be done but to give up.
    pub(crate) fn check_time(&self, started: Instant) -> Result<(), MigrationFailure> {
        let limits = self.lock();
        match limits.timeout {
            // A chain that ends with a switch, and one that may, has its word at the end of the round.
            Some(timeout) if started.elapsed() >= timeout && limits.if_stuck.gives_up() => {
                Err(MigrationFailure::TimedOut { timeout })
            }
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.0.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Limits> for LimitsHandle {
    fn from(limits: Limits) -> Self {
        Self::new(limits)
    }
}

/// Lets lanes send no faster than a bandwidth limit allows, all of them together.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
    bucket: Mutex<Bucket>,
    /// The rate was changed.
    changed: Condvar,
    began: Instant,
}

impl Default for RateLimiter {
    fn default() -> Self {
        let (rate, bucket, changed) = Default::default();
        Self { rate, bucket, changed, began: Instant::now() }
    }
}

impl RateLimiter {
    fn set(&self, rate: Option<NonZeroU64>) {
        let rate = rate.map_or(0, NonZeroU64::get);
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            // Under the lock, so that no lane is between its look at the rate and its wait.
            self.lock().reset();
            self.changed.notify_all();
        }
    }

    /// The most bytes to ask for at once, if there is a limit.
    pub(crate) fn portion_bytes(&self) -> Option<u64> {
        NonZeroU64::new(self.rate.load(Ordering::Relaxed)).map(Bucket::portion_bytes)
    }

    /// Waits until so many bytes may be sent, or `check` says that nothing is to be sent any more.
    pub(crate) fn take(
        &self,
        bytes: u64,
        check: impl Fn() -> Result<(), MigrationFailure>,
    ) -> Result<(), MigrationFailure> {
        let Some(rate) = NonZeroU64::new(self.rate.load(Ordering::Relaxed)) else { return Ok(()) };
        let mut bucket = self.lock();
        let began = self.began.elapsed();
        let until = began + bucket.take(began, bytes, rate);
        loop {
            let left = until.saturating_sub(self.began.elapsed());
            if left.is_zero() || self.rate.load(Ordering::Relaxed) != rate.get() {
                return Ok(());
            }
            check()?;
            let nap = left.min(NAP_MAX);
            bucket = self.changed.wait_timeout(bucket, nap).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a lane sleeps at most before it looks whether the migration is over.
const NAP_MAX: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::source::Cancel;

    fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes_per_second)
    }

    #[test]
    fn whoever_waits_for_a_slow_pace_goes_on_when_it_is_lifted_or_the_migration_cancelled() {
        let slow = LimitsHandle::new(Limits { bandwidth_max: rate(1), ..Limits::default() });
        let cancel = Cancel::default();
        thread::scope(|scope| {
            let lanes = [0, 1].map(|_| {
                scope.spawn(|| {
                    slow.pace().take(4096, || cancel.check())?;
                    slow.pace().take(4096, || cancel.check())
                })
            });
            thread::sleep(Duration::from_millis(20));
            assert!(lanes.iter().any(|lane| !lane.is_finished()), "an hour's worth");
            slow.change(|limits| limits.bandwidth_max = None);
            for lane in lanes {
                lane.join().unwrap().unwrap();
            }
            slow.change(|limits| limits.bandwidth_max = rate(1));
            slow.pace().take(4096, || cancel.check()).unwrap();
            let waiting = scope.spawn(|| slow.pace().take(4096, || cancel.check()));
            cancel.cancel();
            assert!(matches!(waiting.join().unwrap(), Err(MigrationFailure::Cancelled)));
        });
    }

    #[test]
    fn a_timeout_ends_a_round_only_where_nothing_but_giving_up_is_left() {
        let tuning = |chain: &str| {
            let timeout = Some(Duration::ZERO);
            LimitsHandle::new(Limits { timeout, if_stuck: chain.parse().unwrap(), ..Limits::default() })
        };
        let started = Instant::now();
        for chain in ["throttle", "abort", "throttle,abort"] {
            let ended = tuning(chain).check_time(started);
            assert!(matches!(ended, Err(MigrationFailure::TimedOut { .. })), "{chain}");
        }
        for chain in ["stop", "throttle,stop", "relax", "relax,abort"] {
            assert!(tuning(chain).check_time(started).is_ok(), "{chain}");
        }
        assert!(LimitsHandle::default().check_time(started).is_ok());
    }
}

//! The bandwidth limit of the lanes.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::error::SessionError;
use crate::convergence::{Bucket, LinkLimit};
use crate::poison::IgnorePoison;

/// Keeps all lanes together within a bandwidth limit.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
    /// Nanoseconds from when the latest bytes were due until they could leave.
    late: AtomicU64,
    bucket: Mutex<Bucket>,
    /// Signalled when the rate changes.
    changed: Condvar,
    began: Instant,
}

impl Default for RateLimiter {
    fn default() -> Self {
        let (rate, late, bucket, changed) = Default::default();
        Self { rate, late, bucket, changed, began: Instant::now() }
    }
}

impl RateLimiter {
    pub(crate) fn set(&self, rate: Option<NonZeroU64>) {
        let rate = rate.map_or(0, NonZeroU64::get);
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            // Under the lock, so that no lane is between its look at the rate and its wait.
            self.lock().reset();
            self.late.store(0, Ordering::Relaxed);
            self.changed.notify_all();
        }
    }

    /// The most bytes to ask for at once, if a limit is set.
    pub(crate) fn portion_bytes(&self) -> Option<u64> {
        NonZeroU64::new(self.rate.load(Ordering::Relaxed)).map(Bucket::portion_bytes)
    }

    /// The limit with what the lanes may make up for at this moment, if a limit is set.
    pub(crate) fn now(&self) -> Option<LinkLimit> {
        let bytes_per_second = NonZeroU64::new(self.rate.load(Ordering::Relaxed))?;
        Some(LinkLimit { bytes_per_second, unsent: self.lock().behind(self.began.elapsed()) })
    }

    /// How late the latest bytes left: the lane that had them overslept.
    pub(crate) fn late(&self) -> Duration {
        Duration::from_nanos(self.late.load(Ordering::Relaxed))
    }

    /// Waits until this many bytes may be sent, or `check` fails.
    pub(crate) fn take(
        &self,
        bytes: u64,
        check: impl Fn() -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let Some(rate) = NonZeroU64::new(self.rate.load(Ordering::Relaxed)) else { return Ok(()) };
        let mut bucket = self.lock();
        let began = self.began.elapsed();
        let behind = bucket.behind(began);
        let until = began + bucket.take(began, bytes, rate);
        loop {
            let now = self.began.elapsed();
            let (left, late) = (until.saturating_sub(now), behind + now.saturating_sub(until));
            if left.is_zero() {
                self.late.store(u64::try_from(late.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
            if left.is_zero() || self.rate.load(Ordering::Relaxed) != rate.get() {
                return Ok(());
            }
            drop(self.changed.wait_timeout(bucket, left.min(NAP_MAX)));
            // Without the lock: it may wait for one that is held while the rate is set.
            check()?;
            bucket = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().ignore_poison()
    }
}

/// The longest sleep of a lane between two checks whether the migration is over.
const NAP_MAX: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::cancel::Cancel;
    use super::*;

    /// The allowance of [`Bucket`].
    const MADE_UP_FOR_MAX: Duration = Duration::from_millis(10);

    fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes_per_second)
    }

    #[test]
    fn bytes_that_leave_late_are_noted_until_the_rate_changes() {
        let limiter = RateLimiter::default();
        limiter.set(rate(1_000_000));
        thread::sleep(2 * MADE_UP_FOR_MAX);
        assert_eq!(limiter.now().unwrap().unsent, MADE_UP_FOR_MAX);
        limiter.take(1_000_000, || Ok(())).unwrap();
        assert!(limiter.late() >= MADE_UP_FOR_MAX, "{:?}", limiter.late());
        limiter.set(rate(2_000_000));
        assert_eq!(limiter.late(), Duration::ZERO);
        limiter.take(40_000_000, || Ok(())).unwrap();
        assert_eq!(limiter.now().unwrap().unsent, Duration::ZERO, "20 s are sent ahead");
        limiter.set(None);
        assert_eq!(limiter.now(), None);
    }

    #[test]
    fn a_lane_that_waits_holds_no_lock_while_it_checks_whether_to_go_on() {
        let slow = RateLimiter::default();
        slow.set(rate(1));
        let lift = || {
            slow.set(None);
            Ok(())
        };
        slow.take(4096, lift).unwrap();
    }

    #[test]
    fn whoever_waits_for_a_slow_pace_goes_on_when_it_is_lifted_or_the_migration_cancelled() {
        let slow = RateLimiter::default();
        slow.set(rate(1));
        let cancel = Cancel::default();
        thread::scope(|scope| {
            let lanes = [0, 1].map(|_| {
                scope.spawn(|| {
                    slow.take(4096, || cancel.check())?;
                    slow.take(4096, || cancel.check())
                })
            });
            thread::sleep(Duration::from_millis(20));
            assert!(lanes.iter().any(|lane| !lane.is_finished()), "an hour's worth");
            slow.set(None);
            for lane in lanes {
                lane.join().unwrap().unwrap();
            }
            slow.set(rate(1));
            slow.take(4096, || cancel.check()).unwrap();
            let waiting = scope.spawn(|| slow.take(4096, || cancel.check()));
            cancel.cancel();
            assert!(matches!(waiting.join().unwrap(), Err(SessionError::Cancelled)));
        });
    }
}

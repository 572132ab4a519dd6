//! The limits of a migration, changeable while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::convergence::Limits;
use crate::poison::IgnorePoison;
use crate::session::{RateLimiter, SessionError};

/// A handle on the limits of a migration, with which a caller may change them while it runs. The bandwidth
/// limit takes effect at once, the timeout within a stripe, a lower throttle within a second, everything else
/// after the current round.
#[derive(Clone, Debug)]
pub struct LimitsHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Mutex<Limits>,
    pace: RateLimiter,
    /// Nanoseconds after which a round ends because the limits leave only giving up; the greatest value for
    /// never. Each lane asks before each stripe, and a lock that all lanes take would delay them.
    gives_up_after: AtomicU64,
}

impl LimitsHandle {
    /// Starts with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let handle = Self(Arc::new(Shared {
            limits: Mutex::default(),
            pace: RateLimiter::default(),
            gives_up_after: AtomicU64::new(NEVER),
        }));
        handle.change(|set| *set = limits);
        handle
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.lock().clone()
    }

    /// Changes the limits; returns the new ones.
    pub fn change(&self, change: impl FnOnce(&mut Limits)) -> Limits {
        let mut limits = self.lock();
        change(&mut limits);
        self.0.pace.set(limits.bandwidth_max);
        self.0.gives_up_after.store(gives_up_after(&limits), Ordering::Relaxed);
        limits.clone()
    }

    pub(crate) fn pace(&self) -> &RateLimiter {
        &self.0.pace
    }

    /// Fails if a migration that began at `started` has used up its time and its policy is to give up.
    pub(crate) fn check_time(&self, started: Instant) -> Result<(), SessionError> {
        let after = self.0.gives_up_after.load(Ordering::Relaxed);
        if after == NEVER || started.elapsed() < Duration::from_nanos(after) {
            return Ok(());
        }
        Err(SessionError::TimedOut { timeout: Duration::from_nanos(after) })
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.0.limits.lock().ignore_poison()
    }
}

/// Longer than any migration: 584 years.
const NEVER: u64 = u64::MAX;

/// A policy that ends with a switch, or may, decides at the end of the round instead.
fn gives_up_after(limits: &Limits) -> u64 {
    let timeout = limits.timeout.filter(|_| limits.if_stuck.gives_up());
    timeout.and_then(|timeout| u64::try_from(timeout.as_nanos()).ok()).unwrap_or(NEVER)
}

impl Default for LimitsHandle {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl From<Limits> for LimitsHandle {
    fn from(limits: Limits) -> Self {
        Self::new(limits)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_timeout_ends_a_round_only_where_nothing_but_giving_up_is_left() {
        let tuning = |chain: &str| {
            let timeout = Some(Duration::ZERO);
            LimitsHandle::new(Limits { timeout, if_stuck: chain.parse().unwrap(), ..Limits::default() })
        };
        let started = Instant::now();
        for chain in ["throttle", "abort", "throttle,abort"] {
            let ended = tuning(chain).check_time(started);
            assert!(matches!(ended, Err(SessionError::TimedOut { .. })), "{chain}");
        }
        for chain in ["stop", "throttle,stop", "relax", "relax,abort"] {
            assert!(tuning(chain).check_time(started).is_ok(), "{chain}");
        }
        assert!(LimitsHandle::default().check_time(started).is_ok());
    }

    #[test]
    fn a_timeout_that_changes_counts_from_the_next_stripe() {
        let handle = LimitsHandle::new(Limits { if_stuck: "abort".parse().unwrap(), ..Limits::default() });
        let started = Instant::now();
        handle.change(|limits| limits.timeout = Some(Duration::ZERO));
        assert!(handle.clone().check_time(started).is_err());
        handle.change(|limits| limits.timeout = None);
        assert!(handle.check_time(started).is_ok());
    }
}

//! The limits of a migration, changeable while it runs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::convergence::Limits;
use crate::poison::IgnorePoison;
use crate::session::{RateLimiter, SessionError};

/// A handle on the limits of a migration, with which a caller may change them while it runs. The bandwidth
/// limit takes effect at once, the timeout within a stripe, everything else after the current round.
#[derive(Clone, Debug, Default)]
pub struct LimitsHandle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    limits: Mutex<Limits>,
    pace: RateLimiter,
}

impl LimitsHandle {
    /// Starts with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let pace = RateLimiter::default();
        pace.set(limits.bandwidth_max);
        Self(Arc::new(Shared { limits: Mutex::new(limits), pace }))
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
        limits.clone()
    }

    pub(crate) fn pace(&self) -> &RateLimiter {
        &self.0.pace
    }

    /// Fails if a migration that began at `started` has used up its time and its policy is to give up.
    pub(crate) fn check_time(&self, started: Instant) -> Result<(), SessionError> {
        let limits = self.lock();
        match limits.timeout {
            // A policy that ends with a switch, or may, decides at the end of the round.
            Some(timeout) if started.elapsed() >= timeout && limits.if_stuck.gives_up() => {
                Err(SessionError::TimedOut { timeout })
            }
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.0.limits.lock().ignore_poison()
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
}

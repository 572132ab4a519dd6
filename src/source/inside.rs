//! Looks inside a round that takes long: by time, on the thread of the lane that finds one due.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::convergence::Inside;
use crate::session::SessionError;

/// Called for each look inside a pass, with what the pass and the log show; `None` if the log cannot tell
/// what is written meanwhile. An error ends the pass.
pub(super) type LookInside<'look> = &'look (dyn Fn(Option<Inside>) -> Result<(), SessionError> + Sync);

/// When to look inside a pass.
#[derive(Debug)]
pub(super) struct Looks {
    began: Instant,
    /// When the next look is due, in milliseconds since.
    next_ms: AtomicU64,
}

impl Looks {
    /// Inside a pass that began then.
    pub(super) fn since(began: Instant) -> Self {
        Self { began, next_ms: LOOK_EVERY_MS.into() }
    }

    /// For how long the pass has lasted, if a look is due; for one caller.
    pub(super) fn due(&self) -> Option<Duration> {
        let lasted = self.began.elapsed();
        let now_ms = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
        let next_ms = self.next_ms.load(Ordering::Relaxed);
        let is_first = now_ms >= next_ms
            && self
                .next_ms
                .compare_exchange(next_ms, now_ms + LOOK_EVERY_MS, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        is_first.then_some(lasted)
    }
}

/// Two looks, which it takes to know that a guest is too fast, are over well within two seconds.
const LOOK_EVERY_MS: u64 = 700;

//! Conditions that delay the lanes of a round, or end it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::SessionError;
use super::rate_limiter::RateLimiter;

/// Conditions that may delay a round, or end it.
#[derive(Clone, Copy)]
pub(crate) struct SendGate<'migration> {
    pub(crate) pace: &'migration RateLimiter,
    /// Called before every stripe, and while a lane waits for the rate limit.
    pub(crate) check: &'migration (dyn Fn() -> Result<(), SessionError> + Sync),
    /// Where the lanes count what they have done, if another thread looks at it.
    pub(crate) progress: Option<&'migration PassProgress>,
}

/// How far a pass has come.
#[derive(Debug, Default)]
pub(crate) struct PassProgress {
    cleared_pages: AtomicU64,
    sent_bytes: AtomicU64,
}

impl PassProgress {
    /// So many more of the pages to be sent are watched again.
    pub(super) fn cleared(&self, pages: u64) {
        self.cleared_pages.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many of the pages to be sent have been cleared.
    pub(crate) fn cleared_pages(&self) -> u64 {
        self.cleared_pages.load(Ordering::Relaxed)
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

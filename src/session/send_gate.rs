//! What holds the lanes of a round up, or ends it.

use super::error::SessionError;
use super::rate_limiter::RateLimiter;

/// What may hold a round up, or end it.
#[derive(Clone, Copy)]
pub(crate) struct SendGate<'migration> {
    pub(crate) pace: &'migration RateLimiter,
    /// Asked before every stripe, and while a lane waits for its pace.
    pub(crate) check: &'migration (dyn Fn() -> Result<(), SessionError> + Sync),
}

//! Conditions that delay the lanes of a round, or end it.

use super::error::SessionError;
use super::rate_limiter::RateLimiter;

/// Conditions that may delay a round, or end it.
#[derive(Clone, Copy)]
pub(crate) struct SendGate<'migration> {
    pub(crate) pace: &'migration RateLimiter,
    /// Called before every stripe, and while a lane waits for the rate limit.
    pub(crate) check: &'migration (dyn Fn() -> Result<(), SessionError> + Sync),
}

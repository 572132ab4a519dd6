//! The rate of a guest's heartbeats, which shows how much a migration slows the guest.

use std::time::Instant;

use crate::guest::{Guest, heartbeat_of};

/// The latest heartbeat of a guest, if it has any, and its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeartbeatAt(Option<(u64, Instant)>);

impl HeartbeatAt {
    pub(crate) fn now(guest: &dyn Guest) -> Self {
        let beat = heartbeat_of(guest).filter(|beat| beat.count > 0);
        Self(beat.and_then(|beat| Some((beat.count, Instant::now().checked_sub(beat.age)?))))
    }

    /// Beats a second between the two. `None` if too few.
    pub(crate) fn rate_until(self, later: Self) -> Option<f64> {
        const TELLING: u64 = 5;
        let ((before, began), (after, ended)) = (self.0?, later.0?);
        let beats = after.checked_sub(before).filter(|&beats| beats >= TELLING)?;
        let seconds = ended.checked_duration_since(began).filter(|time| !time.is_zero())?.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        Some(beats as f64 / seconds)
    }
}

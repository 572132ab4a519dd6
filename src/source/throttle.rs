//! Throttling the guest.

use super::migration::Migration;
use crate::panics::{Panicked, caught};
use crate::progress::Event;

/// Throttles the guest by this many percent; returns whether the VMM did so.
pub(super) fn throttle(Migration { guest, observer, .. }: Migration<'_>, percent: u8) -> bool {
    let why = match caught(|| guest.throttle(percent)) {
        Ok(Ok(())) => {
            observer.event(&Event::Throttled { percent });
            return true;
        }
        Ok(Err(error)) => error.to_string(),
        Err(Panicked(text)) => format!("the VMM panicked: {text}"),
    };
    tracing::warn!("the guest cannot be throttled to {percent} %: {why}");
    false
}

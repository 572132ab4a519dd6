//! Saving the state of vCPUs and devices, which is sent at the same time.

use super::error::{MigrationFailure, StateLimit};
use super::limits_handle::LimitsHandle;
use super::options::Options;
use crate::control::ControlError;
use crate::guest::SourceGuest;
use crate::saved_state::{STATE_MAX_DEFAULT, SentState, StateSender, StateWriter};
use crate::session::{Cancel, Link};
use crate::wire::Message;

/// Prepares saving, while the guest runs.
pub(super) fn ready(link: &Link, options: &Options) -> Result<StateSender, MigrationFailure> {
    let (limits, cancel): (LimitsHandle, Cancel) = (options.limits.clone(), options.cancel.clone());
    // The lanes share the same rate limit.
    let pace = move |bytes| {
        let pace = limits.pace();
        pace.take(bytes, || cancel.check()).map_err(|_| ControlError::Interrupted)
    };
    StateSender::start(link.control.frame_sender(), limit(link, options).bytes(), pace)
        .map_err(|error| MigrationFailure::System { what: "threads", error: error.to_string() })
}

/// Saves the state of the paused guest; returns once the VMM has written all, when the last part may still be
/// in flight.
pub(super) fn save(
    guest: &dyn SourceGuest,
    limit: StateLimit,
    mut state: StateSender,
) -> Result<SentState, MigrationFailure> {
    let mut sections = StateWriter::new(&mut state);
    let saved = guest.save(&mut sections).and_then(|()| Ok(sections.finish().map(drop)?));
    // Checked first, whatever the VMM makes of a failed write.
    if let Some(state_bytes) = state.too_long() {
        return Err(MigrationFailure::StateTooLong { state_bytes, limit });
    }
    if !state.is_cut() {
        saved?;
    }
    Ok(state.close()?)
}

/// Refuses a guest with a state that already exceeds the limits, before anything is sent.
pub(super) fn check_expected(link: &mut Link, options: &Options) -> Result<(), MigrationFailure> {
    let (state_bytes, limit) = (options.switch_cost.state_bytes, limit(link, options));
    if state_bytes <= limit.bytes() {
        return Ok(());
    }
    let error = MigrationFailure::StateTooLong { state_bytes, limit };
    // The destination may be gone, which changes nothing.
    let _ = link.control.send(&Message::Abort(link.attempt_id, error.to_string()));
    Err(error)
}

/// The lower of the limits of both ends.
pub(super) fn limit(link: &Link, options: &Options) -> StateLimit {
    let ours = options.state_max_bytes.unwrap_or(STATE_MAX_DEFAULT);
    if link.costs_there.state_max_bytes < ours {
        StateLimit::Destination(link.costs_there.state_max_bytes)
    } else {
        StateLimit::Source(ours)
    }
}

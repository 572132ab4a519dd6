//! The answer of a host's records to a source that asks.

use super::opening::HELLO_MAX;
use crate::control::ControlChannel;
use crate::handover::{RecordKind, Side};
use crate::state::{HostState, StateError};
use crate::wire::{AttemptId, Message, Outcome};

/// Sends a source the record of an attempt; returns whether the source then knows that its guest runs on this
/// host, and has recorded that.
pub(super) fn answer(state: &HostState, control: &mut ControlChannel, attempt_id: AttemptId) -> bool {
    let from = control.peer_address();
    let Some(outcome) = outcome(state, attempt_id) else { return false };
    tracing::info!("{from} asks about attempt {attempt_id:?}: {outcome:?}");
    if let Err(error) = control.send(&Message::Outcome(attempt_id, outcome)) {
        tracing::warn!("{from} asked and went away: {error}");
        return false;
    }
    outcome == Outcome::Running
        && control.receive("DONE", Some(HELLO_MAX)).is_ok_and(|done| done == Message::Done(attempt_id))
}

/// The record of an attempt that this process has finished. `None` if no answer is possible yet: an attempt
/// that was given up counts only once that is recorded.
fn outcome(state: &HostState, attempt_id: AttemptId) -> Option<Outcome> {
    let Some((name, record)) = state.find(attempt_id, Side::Destination) else {
        return Some(Outcome::Unknown);
    };
    match record.mark {
        RecordKind::Running => Some(Outcome::Running),
        RecordKind::Refused => Some(Outcome::Refused),
        // The claim records the fate of a guest that ended with its process.
        RecordKind::Prepared => match state.claim(&name) {
            Ok(claim) => match claim.journal().of(attempt_id)?.mark {
                RecordKind::Running => Some(Outcome::Running),
                RecordKind::Refused => Some(Outcome::Refused),
                _ => None,
            },
            // The process that has the guest answers for it.
            Err(StateError::Claimed { .. }) => Some(Outcome::Unknown),
            Err(error) => {
                tracing::error!("{error}");
                None
            }
        },
        RecordKind::Started | RecordKind::Committed | RecordKind::Done => Some(Outcome::Unknown),
    }
}

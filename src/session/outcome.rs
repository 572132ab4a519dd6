//! The answer of a host's records to a source that asks.

use super::opening::HELLO_MAX;
use super::routes::refuse_other_host;
use crate::control::{ControlChannel, Security};
use crate::handover::{Record, RecordKind, Side};
use crate::state::{HostState, StateError};
use crate::wire::{AttemptId, Message, Outcome};

/// Sends a source the record of an attempt; returns whether the source then knows that its guest runs on this
/// host, and has recorded that.
pub(super) fn answer(
    (state, security): (&HostState, &Security),
    control: &mut ControlChannel,
    attempt_id: AttemptId,
) -> bool {
    let from = control.peer_address();
    let found = state.find(attempt_id, Side::Destination);
    if found.as_ref().is_some_and(|(_, record)| !security.belongs_to(record.identity, control.identity())) {
        refuse_other_host(control, &Message::Ask(attempt_id));
        return false;
    }
    let Some(outcome) = outcome(state, found, attempt_id) else { return false };
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
fn outcome(state: &HostState, found: Option<(String, Record)>, attempt_id: AttemptId) -> Option<Outcome> {
    let Some((name, record)) = found else { return Some(Outcome::Unknown) };
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

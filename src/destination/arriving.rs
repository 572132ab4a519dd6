//! The context of all steps of an arrival, and the way to give it up in any step.

use super::durable_handover::DurableHandover;
use super::error::ReceiveError;
use super::lane_ends::LaneEnds;
use super::options::Options;
use super::pending::ArrivalPhase;
use crate::control::ControlChannel;
use crate::guest::{self, DestinationGuest};
use crate::handover::{DestinationAction, DestinationEvent, DestinationState};
use crate::progress::Observer;
use crate::wire::Message;

/// A guest on its way, and the resources of its attempt.
pub(super) struct Arriving<'attempt, G> {
    pub(super) guest: G,
    pub(super) lanes: LaneEnds,
    pub(super) handover: DurableHandover,
    pub(super) options: &'attempt Options,
    pub(super) observer: &'attempt dyn Observer,
}

impl<G: DestinationGuest> Arriving<'_, G> {
    /// Frees what has arrived, before the same guest begins anew.
    pub(super) fn discard(mut self) {
        self.lanes.take_access_away();
        self.lanes.release(self.guest.name());
        guest::discard(self.guest);
    }

    /// After a failure: gives the guest up, if the handover allows that, and reports to the source.
    pub(super) fn give_up(mut self, control: &mut ControlChannel, error: ReceiveError) -> ReceiveError {
        self.lanes.take_access_away();
        // Registered memory stays mapped.
        let releasing = self.lanes.release_beside(self.guest.name());
        let error = match (error, control.liveness().check_heard()) {
            // The lanes were shut down because of this; its cause explains more.
            (ReceiveError::Transport(_), Err(silent)) => silent.into(),
            (error, _) => error,
        };
        let action = match (self.handover.state(), &error) {
            (DestinationState::Refused, _) => Ok(DestinationAction::Refuse),
            (_, ReceiveError::Start(_)) => self.handover.on(DestinationEvent::NotStarted),
            _ => self.handover.on(DestinationEvent::Failed),
        };
        let attempt_id = self.handover.attempt_id();
        // The source may learn that this attempt never ran only now: nothing is left that could run, the name
        // is free, and the lock released.
        let freed = guest::discard(self.guest);
        drop(self.handover);
        self.options.pending.set(ArrivalPhase::Incoming, None);
        if let Some(lock) = &self.options.lock {
            lock.give_up();
        }
        // Also to a source that gave up: it may be unable to record that, and wait for this message instead.
        if action == Ok(DestinationAction::Refuse) && freed {
            let _ = control.send(&Message::Abort(attempt_id, error.to_string()));
        }
        // The next guest needs that memory.
        if let Some(releasing) = releasing {
            let _ = releasing.join();
        }
        error
    }
}

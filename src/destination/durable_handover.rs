//! The ownership of the guest as its destination knows it: the handover's state machine and its records.

use sterna_trust::Fingerprint;

use crate::handover::{
    DestinationAction, DestinationEvent, DestinationHandover, DestinationState, HandoverError, Record, Side,
};
use crate::session::AttemptRecords;
use crate::state::{GuestClaim, StateError};
use crate::wire::AttemptId;

/// The destination's half of one handover; it writes the records that the state machine asks for.
#[derive(Debug)]
pub(super) struct DurableHandover {
    handover: DestinationHandover,
    /// The guest's name on this host.
    claim: GuestClaim,
    records: AttemptRecords,
    /// The source's address.
    peer: String,
    /// The key that the source has proved.
    identity: Option<Fingerprint>,
}

impl DurableHandover {
    /// # Errors
    /// [`StateError::Claimed`] if another attempt writes to the claim's records.
    pub(super) fn new(
        claim: GuestClaim,
        (peer, identity): (String, Option<Fingerprint>),
        attempt_id: AttemptId,
    ) -> Result<Self, StateError> {
        let (handover, records) =
            (DestinationHandover::new(attempt_id), AttemptRecords::new(claim.writer()?));
        Ok(Self { handover, claim, records, peer, identity })
    }

    pub(super) fn attempt_id(&self) -> AttemptId {
        self.handover.attempt_id()
    }

    pub(super) fn state(&self) -> DestinationState {
        self.handover.state()
    }

    /// How long a record takes.
    pub(super) fn record_time(&self) -> std::time::Duration {
        self.records.record_time()
    }

    /// The attempt is over; the guest's name stays claimed.
    pub(super) fn into_claim(self) -> GuestClaim {
        self.claim
    }

    /// Reports an event to the state machine and writes the records that it asks for; returns the next
    /// action.
    pub(super) fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        let mut action = self.handover.on(event)?;
        while let DestinationAction::Record(mark) = action {
            let (attempt_id, peer) = (self.handover.attempt_id(), self.peer.clone());
            let (side, identity) = (Side::Destination, self.identity);
            let record = Record { mark, side, attempt_id, peer, address: None, identity };
            let (recorded, not_recorded) = (DestinationEvent::Recorded, DestinationEvent::NotRecorded);
            action = self.handover.on(self.records.write(record, recorded, not_recorded))?;
        }
        Ok(action)
    }

    /// Why a record could not be written.
    pub(super) fn take_unrecorded(&mut self) -> Option<StateError> {
        self.records.take_unrecorded()
    }
}

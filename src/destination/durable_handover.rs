//! Whose the guest is, as its destination sees it: the handover's machine and its records.

use crate::handover::{
    DestinationAction, DestinationEvent, DestinationHandover, DestinationState, HandoverError, Record,
    RecordKind, Side,
};
use crate::state::{GuestClaim, HostState, RecordWriter, StateError};
use crate::wire::{AttemptId, Outcome};

/// The destination's half of one handover; what the machine wants recorded is recorded.
#[derive(Debug)]
pub(super) struct DurableHandover {
    handover: DestinationHandover,
    /// The guest's name on this host.
    claim: GuestClaim,
    records: RecordWriter,
    /// The source, as the network names it.
    peer: String,
    /// Why a record could not be written.
    unrecorded: Option<StateError>,
}

impl DurableHandover {
    /// # Errors
    /// [`StateError::Claimed`] if another attempt writes to the claim's records.
    pub(super) fn new(claim: GuestClaim, peer: String, attempt_id: AttemptId) -> Result<Self, StateError> {
        let (handover, records) = (DestinationHandover::new(attempt_id), claim.writer()?);
        Ok(Self { handover, claim, records, peer, unrecorded: None })
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

    /// Reports an event to the handover, and records what it wants recorded; returns what is to be done then.
    pub(super) fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        let mut action = self.handover.on(event)?;
        while let DestinationAction::Record(mark) = action {
            let recorded = self.record(mark);
            action = self.handover.on(recorded)?;
        }
        Ok(action)
    }

    fn record(&mut self, mark: RecordKind) -> DestinationEvent {
        let (attempt_id, peer) = (self.handover.attempt_id(), self.peer.clone());
        match self.records.append(Record { mark, side: Side::Destination, attempt_id, peer, address: None }) {
            Ok(()) => DestinationEvent::Recorded(mark),
            Err(error) => {
                tracing::error!("{mark} is not recorded: {error}");
                self.unrecorded.get_or_insert(error);
                DestinationEvent::NotRecorded(mark)
            }
        }
    }

    /// Why something could not be recorded.
    pub(super) fn take_unrecorded(&mut self) -> Option<StateError> {
        self.unrecorded.take()
    }
}

/// What this host's state says of an attempt that this process has nothing more to do with. `None` if it cannot be said: what was
/// given up counts only once that is recorded.
pub(super) fn outcome(state: &HostState, attempt_id: AttemptId) -> Option<Outcome> {
    let Some((name, record)) = state.find(attempt_id, Side::Destination) else {
        return Some(Outcome::Unknown);
    };
    match record.mark {
        RecordKind::Running => Some(Outcome::Running),
        RecordKind::Refused => Some(Outcome::Refused),
        // To claim it records what became of a guest whose process has ended.
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

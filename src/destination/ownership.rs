//! Whose the guest is, as its destination sees it: the handover's machine and its journal.

use crate::handover::{
    DestinationAction, DestinationEvent, DestinationHandover, DestinationState, HandoverError, Mark, Side,
};
use crate::journal::{Journals, JournalsError, OpenJournal};
use crate::wire::{Epoch, Outcome};

/// The destination's half of one handover; what it wants recorded is recorded.
#[derive(Debug)]
pub(super) struct Ownership {
    handover: DestinationHandover,
    journal: OpenJournal,
    /// The source, as the network names it.
    peer: String,
    /// Why a record could not be written.
    unrecorded: Option<JournalsError>,
}

impl Ownership {
    pub(super) fn new(journal: OpenJournal, peer: String, epoch: Epoch) -> Self {
        Self { handover: DestinationHandover::new(epoch), journal, peer, unrecorded: None }
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.handover.epoch()
    }

    pub(super) fn state(&self) -> DestinationState {
        self.handover.state()
    }

    /// Tells the handover what happened, and records what it wants recorded; returns what is to be done then.
    pub(super) fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        let action = self.handover.on(event)?;
        self.record_all(action)
    }

    fn record_all(&mut self, mut action: DestinationAction) -> Result<DestinationAction, HandoverError> {
        while let DestinationAction::Record(mark) = action {
            let recorded = self.record(mark);
            action = self.handover.on(recorded)?;
        }
        Ok(action)
    }

    fn record(&mut self, mark: Mark) -> DestinationEvent {
        match self.journal.append(mark, self.handover.epoch(), &self.peer) {
            Ok(()) => DestinationEvent::Recorded(mark),
            Err(error) => {
                tracing::error!("{mark} is not recorded: {error}");
                self.unrecorded.get_or_insert(error);
                DestinationEvent::NotRecorded(mark)
            }
        }
    }

    /// Why something could not be recorded.
    pub(super) fn take_unrecorded(&mut self) -> Option<JournalsError> {
        self.unrecorded.take()
    }
}

/// What the journals here say of an attempt that this process has nothing more to do with. `None` if it cannot be said: what was
/// given up counts only once that is recorded.
pub(super) fn outcome(journals: &Journals, epoch: Epoch) -> Option<Outcome> {
    let Some((name, record)) = journals.find(epoch, Side::Destination) else { return Some(Outcome::Unknown) };
    match record.mark {
        Mark::Running => Some(Outcome::Running),
        Mark::Refused => Some(Outcome::Refused),
        Mark::Prepared => match journals.open(&name, Side::Destination) {
            Ok(journal) => give_up(journal, epoch),
            // Whoever holds the guest answers for it.
            Err(JournalsError::InUse(_)) => Some(Outcome::Unknown),
            Err(error) => {
                tracing::error!("{error}");
                None
            }
        },
        Mark::Committed | Mark::Done => Some(Outcome::Unknown),
    }
}

/// Settles the last word on an attempt whose process has ended: nobody else writes to the journal, so nobody runs that guest.
fn give_up(journal: OpenJournal, epoch: Epoch) -> Option<Outcome> {
    let last = journal.journal().of(epoch)?.clone();
    let (handover, action) = DestinationHandover::recover(epoch, last.mark).ok()?;
    let mut ownership = Ownership { handover, journal, peer: last.peer, unrecorded: None };
    ownership.record_all(action).ok()?;
    match ownership.state() {
        DestinationState::Running => Some(Outcome::Running),
        DestinationState::Refused => Some(Outcome::Refused),
        _ => None,
    }
}

/// Settles what the journal of a guest leaves open here: a guest that was ready to run, and whose process has ended, never ran.
/// Returns the last record as it is then; `None` if there is no journal, or nothing in it.
///
/// # Errors
/// [`JournalsError`], also if the guest's process is alive, or if the record cannot be written.
pub fn settle(journals: &Journals, name: &str) -> Result<Option<crate::handover::Record>, JournalsError> {
    let Some(found) = journals.look(name, Side::Destination)? else { return Ok(None) };
    if found.last().is_none_or(|last| last.mark != Mark::Prepared) {
        return Ok(found.last().cloned());
    }
    let mut journal = journals.open(name, Side::Destination)?;
    if let Some(last) = journal.journal().last().filter(|last| last.mark == Mark::Prepared).cloned() {
        journal.append(Mark::Refused, last.epoch, &last.peer)?;
    }
    Ok(journal.journal().last().cloned())
}

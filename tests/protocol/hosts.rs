//! The two hosts: their parts, and their machines' reactions to events.

use sterna::handover::{
    DestinationAction, DestinationEvent, DestinationHandover, DestinationState, GuestHere, HandoverError,
    RecordKind, SourceAction, SourceEvent, SourceHandover, SourceState,
};

use super::{Attempt, Outcome};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Journal {
    records: Vec<(Attempt, RecordKind)>,
    /// The call that wrote the last record failed, so the next record takes its place.
    pub(super) unsure: bool,
}

impl Journal {
    pub(super) fn write(&mut self, attempt: Attempt, mark: RecordKind, outcome: Outcome) {
        if outcome == Outcome::Bad {
            return;
        }
        if std::mem::replace(&mut self.unsure, outcome == Outcome::BadButWritten) {
            self.records.pop();
        }
        self.records.push((attempt, mark));
    }

    pub(crate) fn last(&self) -> Option<(Attempt, RecordKind)> {
        self.records.last().copied()
    }

    pub(crate) fn says(&self, attempt: Attempt, mark: RecordKind) -> bool {
        self.records.contains(&(attempt, mark))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) is_up: bool,
    pub(crate) machine: Option<SourceHandover>,
    pub(crate) attempt: Attempt,
    pub(crate) guest: GuestHere,
    pub(crate) journal: Journal,
    pub(crate) to_do: Option<SourceAction>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum GuestThere {
    None,
    Loaded,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ram {
    Empty,
    Old,
    Complete,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    pub(crate) is_up: bool,
    pub(crate) machine: Option<DestinationHandover>,
    pub(crate) attempt: Attempt,
    pub(crate) guest: GuestThere,
    pub(crate) ram: Ram,
    pub(crate) compared: bool,
    /// The attempt that the queue pairs and regions still belong to.
    pub(crate) open_to: Option<Attempt>,
    pub(crate) journal: Journal,
    pub(crate) to_do: Option<DestinationAction>,
    /// The guest has run at this host, at any time.
    pub(crate) has_run: bool,
    /// This side owned the guest, which ended with the host.
    pub(crate) lost_guest: bool,
    /// A remote write reached the memory of a running guest.
    pub(crate) written_while_running: bool,
    /// The source resumed its guest although the guest had run at the destination, and no operator had
    /// written that off.
    pub(crate) old_image_ran: bool,
}

impl Source {
    pub(crate) fn state(&self) -> Option<SourceState> {
        self.machine.as_ref().map(SourceHandover::state)
    }

    pub(crate) fn hears(&self) -> bool {
        self.is_up && self.to_do.is_none()
    }

    pub(super) fn on(&mut self, event: SourceEvent) {
        let Some(machine) = &mut self.machine else { return };
        match machine.on(event) {
            // The model does both at once.
            Ok(SourceAction::SendFinal | SourceAction::AwaitPrepared) => {}
            Ok(action) => self.to_do = Some(action),
            // Late, repeated, or of another attempt: ignored.
            Err(HandoverError::OutOfTurn { .. } | HandoverError::OtherAttempt { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

impl Destination {
    pub(crate) fn state(&self) -> Option<DestinationState> {
        self.machine.as_ref().map(DestinationHandover::state)
    }

    pub(crate) fn hears(&self) -> bool {
        self.is_up && self.to_do.is_none()
    }

    pub(super) fn on(&mut self, event: DestinationEvent) {
        let Some(machine) = &mut self.machine else { return };
        match machine.on(event) {
            Ok(DestinationAction::Continue) => {}
            Ok(action) => self.to_do = Some(action),
            Err(HandoverError::OutOfTurn { .. } | HandoverError::OtherAttempt { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    pub(super) fn written(&mut self, attempt: Attempt, ram: Ram) {
        if self.open_to == Some(attempt) {
            self.ram = ram;
            self.written_while_running |= self.guest == GuestThere::Running;
        }
    }

    pub(super) fn discard(&mut self) {
        assert_ne!(self.guest, GuestThere::Running, "a guest that runs is not discarded");
        (self.guest, self.open_to, self.ram, self.compared) = (GuestThere::None, None, Ram::Empty, false);
    }
}

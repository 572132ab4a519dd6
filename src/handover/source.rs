use super::HandoverError;
use crate::wire::Epoch;

/// Where the source is in giving its guest away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// The guest runs here.
    Running,
    /// It is paused here; everything can still be undone.
    Paused,
    /// FINAL is sent.
    AwaitingPrepared,
    /// The destination is prepared. The last state in which the source may change its mind.
    Committed,
    /// GO was attempted: the guest may run at the destination.
    AwaitingRunning,
    /// The destination runs it.
    Released,
    /// The attempt is over and the guest is here.
    Kept,
    /// GO was attempted and nothing came back. The guest stays paused.
    InDoubt,
}

/// What happened at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The vCPUs are about to be paused.
    Pausing,
    /// FINAL was sent.
    FinalSent,
    /// The destination says it is prepared.
    Prepared(Epoch),
    /// GO is about to be sent. Reported *before* the first byte leaves, since a failed send may have arrived.
    GoAttempted,
    /// The destination says that it runs the guest.
    Running(Epoch),
    /// The destination says that it did not run the guest of this epoch, and never will.
    Refused(Epoch),
    /// Anything failed, the link was lost, or the operator cancelled.
    Failed,
}

/// What the source must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Go on.
    Continue,
    /// Report [`SourceEvent::GoAttempted`], then send GO.
    SendGo,
    /// Let the guest run here (again).
    Resume,
    /// Destroy the guest: it runs at the destination.
    Release,
    /// Keep the guest paused and tell the operator.
    Hold,
}

/// The source's half of the handover of one attempt.
#[derive(Clone, Debug)]
pub struct SourceHandover {
    epoch: Epoch,
    state: SourceState,
}

impl SourceHandover {
    /// The beginning of an attempt.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, state: SourceState::Running }
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event and says what to do.
    ///
    /// # Errors
    /// [`HandoverError`] if the event may not happen now; nothing changes.
    pub fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        use {SourceAction as Do, SourceEvent as E, SourceState as S};
        if let E::Prepared(got) | E::Running(got) | E::Refused(got) = event
            && got != self.epoch
        {
            return Err(HandoverError::OtherEpoch { ours: self.epoch, got });
        }
        let (state, action) = match (self.state, event) {
            (S::Running, E::Pausing) => (S::Paused, Do::Continue),
            (S::Paused, E::FinalSent) => (S::AwaitingPrepared, Do::Continue),
            (S::AwaitingPrepared, E::Prepared(_)) => (S::Committed, Do::SendGo),
            (S::Committed, E::GoAttempted) => (S::AwaitingRunning, Do::Continue),
            (S::AwaitingRunning | S::InDoubt, E::Running(_)) => (S::Released, Do::Release),
            // Before GO was attempted the guest is the source's, whatever happened.
            (S::Running | S::Paused | S::AwaitingPrepared | S::Committed, E::Failed | E::Refused(_))
            | (S::AwaitingRunning | S::InDoubt, E::Refused(_)) => (S::Kept, Do::Resume),
            (S::AwaitingRunning | S::InDoubt, E::Failed) => (S::InDoubt, Do::Hold),
            (state, event) => {
                return Err(HandoverError::OutOfTurn { event: event.name(), state: state.name() });
            }
        };
        self.state = state;
        Ok(action)
    }
}

impl SourceState {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "running at the source",
            Self::Paused => "paused at the source",
            Self::AwaitingPrepared => "awaiting PREPARED",
            Self::Committed => "committed",
            Self::AwaitingRunning => "awaiting RUNNING",
            Self::Released => "released",
            Self::Kept => "kept at the source",
            Self::InDoubt => "in doubt",
        }
    }
}

impl SourceEvent {
    fn name(self) -> &'static str {
        match self {
            Self::Pausing => "pausing",
            Self::FinalSent => "FINAL sent",
            Self::Prepared(_) => "PREPARED",
            Self::GoAttempted => "GO attempted",
            Self::Running(_) => "RUNNING",
            Self::Refused(_) => "REFUSED",
            Self::Failed => "failure",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch([1; 16]);
    const ORDER: [SourceEvent; 5] = [
        SourceEvent::Pausing,
        SourceEvent::FinalSent,
        SourceEvent::Prepared(EPOCH),
        SourceEvent::GoAttempted,
        SourceEvent::Running(EPOCH),
    ];

    fn after(steps: usize) -> SourceHandover {
        let mut handover = SourceHandover::new(EPOCH);
        for &event in &ORDER[..steps] {
            handover.on(event).unwrap();
        }
        handover
    }

    #[test]
    fn in_order_it_ends_with_the_guest_released() {
        assert_eq!(after(2).on(ORDER[2]), Ok(SourceAction::SendGo));
        let mut handover = after(4);
        assert_eq!(handover.on(ORDER[4]), Ok(SourceAction::Release));
        assert_eq!(handover.state(), SourceState::Released);
    }

    #[test]
    fn a_failure_resumes_the_guest_until_go_is_attempted_and_never_after() {
        for steps in 0..=3 {
            assert_eq!(after(steps).on(SourceEvent::Failed), Ok(SourceAction::Resume), "after {steps} steps");
        }
        let mut handover = after(4);
        for _ in 0..3 {
            assert_eq!(handover.on(SourceEvent::Failed), Ok(SourceAction::Hold));
        }
        assert_eq!(handover.state(), SourceState::InDoubt);
        assert!(after(5).on(SourceEvent::Failed).is_err(), "a released guest does not come back");
    }

    #[test]
    fn only_the_destinations_word_of_this_epoch_settles_a_doubt() {
        let other = Epoch([2; 16]);
        let mut handover = after(4);
        handover.on(SourceEvent::Failed).unwrap();
        for event in [SourceEvent::Refused(other), SourceEvent::Running(other), SourceEvent::Prepared(other)]
        {
            assert_eq!(handover.on(event), Err(HandoverError::OtherEpoch { ours: EPOCH, got: other }));
        }
        assert_eq!(handover.clone().on(SourceEvent::Refused(EPOCH)), Ok(SourceAction::Resume));
        assert_eq!(handover.on(SourceEvent::Running(EPOCH)), Ok(SourceAction::Release));
    }

    #[test]
    fn steps_cannot_be_skipped() {
        for (steps, skipped) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (0, 4)] {
            let mut handover = after(steps);
            assert!(
                matches!(handover.on(ORDER[skipped]), Err(HandoverError::OutOfTurn { .. })),
                "{steps} → {skipped}"
            );
            assert_eq!(handover.state(), after(steps).state());
        }
    }
}

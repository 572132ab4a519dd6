use super::HandoverError;
use crate::wire::Epoch;

/// Where the destination is in taking a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationState {
    /// Pages arrive.
    Receiving,
    /// FINAL has come; remote access is being taken away.
    Revoking,
    /// Nobody else can write; memory is compared and state loaded.
    Loading,
    /// Ready to run, and waiting for GO.
    Prepared,
    /// It runs here.
    Running,
    /// Given up: this epoch did not run here and never will.
    Refused,
}

/// What happened at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// FINAL, and the last fence on every lane.
    Final(Epoch),
    /// Queue pairs are destroyed, regions deregistered, connections closed.
    Revoked,
    /// Memory was found equal and the state is loaded.
    Loaded,
    /// The source gives the guest away.
    Go(Epoch),
    /// Anything failed, the link was lost, or the source cancelled.
    Failed,
}

/// What the destination must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Take every remote access away.
    Revoke,
    /// Compare memory and load the state.
    Load,
    /// Tell the source that all is in place.
    SendPrepared,
    /// Start the first vCPU, then send RUNNING.
    Run,
    /// Say RUNNING (again).
    SendRunning,
    /// Free the guest; tell the source, if it can be reached, that this epoch never ran.
    Discard,
    /// Leave the guest running: it is this side's alone.
    Continue,
}

/// The destination's half of the handover of one attempt.
#[derive(Clone, Debug)]
pub struct DestinationHandover {
    epoch: Epoch,
    state: DestinationState,
}

impl DestinationHandover {
    /// The beginning of an attempt.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, state: DestinationState::Receiving }
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// Takes an event and says what to do.
    ///
    /// # Errors
    /// [`HandoverError`] if the event may not happen now; nothing changes.
    pub fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        use {DestinationAction as Do, DestinationEvent as E, DestinationState as S};
        if let E::Final(got) | E::Go(got) = event
            && got != self.epoch
        {
            return Err(HandoverError::OtherEpoch { ours: self.epoch, got });
        }
        let (state, action) = match (self.state, event) {
            (S::Receiving, E::Final(_)) => (S::Revoking, Do::Revoke),
            (S::Revoking, E::Revoked) => (S::Loading, Do::Load),
            (S::Loading, E::Loaded) => (S::Prepared, Do::SendPrepared),
            (S::Prepared, E::Go(_)) => (S::Running, Do::Run),
            // GO may be repeated, the guest is not started twice.
            (S::Running, E::Go(_)) => (S::Running, Do::SendRunning),
            (S::Running, E::Failed) => (S::Running, Do::Continue),
            // A late GO finds that this side has given up for good.
            (S::Refused, E::Go(_) | E::Failed) => (S::Refused, Do::Discard),
            (S::Receiving | S::Revoking | S::Loading | S::Prepared, E::Failed) => (S::Refused, Do::Discard),
            (state, event) => {
                return Err(HandoverError::OutOfTurn { event: event.name(), state: state.name() });
            }
        };
        self.state = state;
        Ok(action)
    }
}

impl DestinationState {
    fn name(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Revoking => "revoking remote access",
            Self::Loading => "loading",
            Self::Prepared => "prepared",
            Self::Running => "running at the destination",
            Self::Refused => "refused",
        }
    }
}

impl DestinationEvent {
    fn name(self) -> &'static str {
        match self {
            Self::Final(_) => "FINAL",
            Self::Revoked => "revoked",
            Self::Loaded => "loaded",
            Self::Go(_) => "GO",
            Self::Failed => "failure",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch([1; 16]);
    const ORDER: [DestinationEvent; 4] = [
        DestinationEvent::Final(EPOCH),
        DestinationEvent::Revoked,
        DestinationEvent::Loaded,
        DestinationEvent::Go(EPOCH),
    ];

    fn after(steps: usize) -> DestinationHandover {
        let mut handover = DestinationHandover::new(EPOCH);
        for &event in &ORDER[..steps] {
            handover.on(event).unwrap();
        }
        handover
    }

    #[test]
    fn it_runs_only_on_go_and_only_once() {
        for steps in 0..3 {
            assert!(after(steps).on(DestinationEvent::Go(EPOCH)).is_err(), "GO after {steps} steps");
        }
        let mut handover = after(3);
        assert_eq!(handover.on(DestinationEvent::Go(EPOCH)), Ok(DestinationAction::Run));
        assert_eq!(handover.on(DestinationEvent::Go(EPOCH)), Ok(DestinationAction::SendRunning));
        assert_eq!(handover.on(DestinationEvent::Failed), Ok(DestinationAction::Continue));
        assert_eq!(handover.state(), DestinationState::Running);
    }

    #[test]
    fn what_was_given_up_never_runs() {
        for steps in 0..=3 {
            let mut handover = after(steps);
            assert_eq!(handover.on(DestinationEvent::Failed), Ok(DestinationAction::Discard));
            assert_eq!(handover.on(DestinationEvent::Go(EPOCH)), Ok(DestinationAction::Discard));
            assert_eq!(handover.state(), DestinationState::Refused);
        }
    }

    #[test]
    fn go_of_another_attempt_is_refused() {
        let mut handover = after(3);
        assert!(matches!(
            handover.on(DestinationEvent::Go(Epoch([2; 16]))),
            Err(HandoverError::OtherEpoch { .. })
        ));
        assert_eq!(handover.state(), DestinationState::Prepared);
    }

    #[test]
    fn memory_is_not_loaded_before_remote_access_is_revoked() {
        assert!(after(1).on(DestinationEvent::Loaded).is_err());
        assert!(after(0).on(DestinationEvent::Revoked).is_err());
    }
}

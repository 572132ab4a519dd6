use super::HandoverError;
use super::journal::RecordKind;
use crate::wire::AttemptId;

/// State of the handover at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// Pages arrive.
    Receiving,
    /// FINAL arrived; remote access is being revoked.
    Revoking,
    /// No other process can write to the memory; it is compared and the state is loaded.
    Loading,
    /// PREPARED is being recorded.
    Preparing,
    /// Ready to run; the destination waits for GO.
    Prepared,
    /// GO arrived; RUNNING is being recorded.
    CommittingToRun,
    /// The first vCPU is being started.
    Starting,
    /// The guest runs, or has run, at the destination.
    Running,
    /// Abandoned; REFUSED is being recorded.
    Refusing,
    /// Abandoned, but REFUSED could not be recorded yet.
    Unwilling,
    /// Abandoned: this attempt never ran at the destination and never will.
    Refused,
}

/// An event at the destination, reported by its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// FINAL and the last fence of every lane arrived.
    Final(AttemptId),
    /// Queue pairs are destroyed, regions deregistered and connections closed.
    Revoked,
    /// The memory compared equal and the state is loaded.
    Loaded,
    /// This record is durable in the journal.
    Recorded(RecordKind),
    /// This record is not in the journal, or its fate is unknown.
    NotRecorded(RecordKind),
    /// The source hands the guest over.
    Go(AttemptId),
    /// The vCPUs run.
    Started,
    /// The vCPUs could not be started, and none has run.
    NotStarted,
    /// The source asks for the outcome of this attempt.
    Asked(AttemptId),
    /// A step failed, the wait timed out, or the source gave up.
    Failed,
    /// The operator states that the source's host is fenced: it runs nothing and will not run this guest.
    Fenced,
}

/// What the driver must do before it reports another event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Revoke all remote access.
    Revoke,
    /// Compare memory and load the state.
    Load,
    /// Write this record durably; report [`DestinationEvent::Recorded`] or [`DestinationEvent::NotRecorded`].
    Record(RecordKind),
    /// Tell the source that the guest is ready to run.
    SendPrepared,
    /// Start the first vCPU; report [`DestinationEvent::Started`] or [`DestinationEvent::NotStarted`].
    Run,
    /// Send RUNNING, possibly again.
    SendRunning,
    /// Discard the guest; then tell the source, if it can be reached, that this attempt never ran.
    Refuse,
    /// Discard the guest and send nothing: the journal does not record the refusal yet.
    Discard,
    /// Continue: a guest that runs belongs to the destination alone.
    Continue,
}

/// The destination's half of the handover of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationHandover {
    attempt_id: AttemptId,
    state: DestinationState,
}

impl DestinationHandover {
    /// Starts an attempt.
    #[must_use]
    pub fn new(attempt_id: AttemptId) -> Self {
        Self { attempt_id, state: DestinationState::Receiving }
    }

    /// Resumes from the last record of the destination's journal after a crash, which destroyed the guest's
    /// memory.
    ///
    /// # Errors
    /// [`HandoverError::OtherSide`] for a record that no destination writes.
    #[cfg_attr(not(feature = "unstable"), allow(dead_code, reason = "the model of two hosts uses it"))]
    pub fn recover(
        attempt_id: AttemptId,
        last: RecordKind,
    ) -> Result<(Self, DestinationAction), HandoverError> {
        use {DestinationAction as Do, DestinationState as S};
        let (state, action) = match last {
            // Had the guest ever run, RUNNING would follow.
            RecordKind::Prepared => (S::Refusing, Do::Record(RecordKind::Refused)),
            RecordKind::Running => (S::Running, Do::Continue),
            RecordKind::Refused => (S::Refused, Do::Continue),
            RecordKind::Started | RecordKind::Committed | RecordKind::Done => {
                return Err(HandoverError::OtherSide(last));
            }
        };
        Ok((Self { attempt_id, state }, action))
    }

    /// The attempt.
    #[must_use]
    pub fn attempt_id(&self) -> AttemptId {
        self.attempt_id
    }

    /// The current state.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// Takes an event and returns the action for the driver.
    ///
    /// # Errors
    /// [`HandoverError`] if the event is not allowed in this state; the state does not change.
    pub fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        use {DestinationAction as Do, DestinationEvent as E, DestinationState as S};
        if let E::Final(got) | E::Go(got) | E::Asked(got) = event
            && got != self.attempt_id
        {
            return Err(HandoverError::OtherAttempt { ours: self.attempt_id, got });
        }
        let (state, action) = match (self.state, event) {
            (S::Receiving, E::Final(_)) => (S::Revoking, Do::Revoke),
            (S::Revoking, E::Revoked) => (S::Loading, Do::Load),
            (S::Loading, E::Loaded) => (S::Preparing, Do::Record(RecordKind::Prepared)),
            (S::Preparing, E::Recorded(RecordKind::Prepared)) => (S::Prepared, Do::SendPrepared),
            // PREPARED was never sent, so the source sent no GO and will not ask.
            (S::Receiving | S::Revoking | S::Loading, E::Failed)
            | (S::Preparing, E::NotRecorded(RecordKind::Prepared)) => (S::Refused, Do::Refuse),
            (S::Prepared, E::Asked(_)) => (S::Prepared, Do::SendPrepared),
            (S::Prepared, E::Go(_) | E::Fenced) => (S::CommittingToRun, Do::Record(RecordKind::Running)),
            (S::CommittingToRun, E::Recorded(RecordKind::Running)) => (S::Starting, Do::Run),
            (S::Starting, E::Started) => (S::Running, Do::SendRunning),
            // GO may be repeated; the guest is not started twice.
            (S::Running, E::Go(_) | E::Asked(_)) => (S::Running, Do::SendRunning),
            (S::Running, E::Failed) => (S::Running, Do::Continue),
            (S::Prepared, E::Failed)
            | (S::CommittingToRun, E::NotRecorded(RecordKind::Running))
            | (S::Starting, E::NotStarted)
            | (S::Unwilling, E::Go(_) | E::Asked(_) | E::Failed) => {
                (S::Refusing, Do::Record(RecordKind::Refused))
            }
            (S::Refusing, E::Recorded(RecordKind::Refused)) => (S::Refused, Do::Refuse),
            (S::Refusing, E::NotRecorded(RecordKind::Refused)) => (S::Unwilling, Do::Discard),
            // A late GO finds that the destination has refused for good.
            (S::Refused, E::Go(_) | E::Asked(_)) => (S::Refused, Do::Refuse),
            (S::Refused, E::Failed) => (S::Refused, Do::Continue),
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
            Self::Preparing => "recording PREPARED",
            Self::Prepared => "prepared",
            Self::CommittingToRun => "recording RUNNING",
            Self::Starting => "starting",
            Self::Running => "running at the destination",
            Self::Refusing => "recording REFUSED",
            Self::Unwilling => "given up without a record",
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
            Self::Recorded(_) => "recorded",
            Self::NotRecorded(_) => "not recorded",
            Self::Go(_) => "GO",
            Self::Started => "started",
            Self::NotStarted => "not started",
            Self::Asked(_) => "a question",
            Self::Failed => "failure",
            Self::Fenced => "the other host is fenced",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);
    const GO: DestinationEvent = DestinationEvent::Go(ATTEMPT_ID);
    const ASKED: DestinationEvent = DestinationEvent::Asked(ATTEMPT_ID);
    const ORDER: [DestinationEvent; 7] = [
        DestinationEvent::Final(ATTEMPT_ID),
        DestinationEvent::Revoked,
        DestinationEvent::Loaded,
        DestinationEvent::Recorded(RecordKind::Prepared),
        GO,
        DestinationEvent::Recorded(RecordKind::Running),
        DestinationEvent::Started,
    ];
    const PREPARED: usize = 4;

    fn after(steps: usize) -> DestinationHandover {
        let mut handover = DestinationHandover::new(ATTEMPT_ID);
        for &event in &ORDER[..steps] {
            handover.on(event).unwrap();
        }
        handover
    }

    #[test]
    fn it_runs_only_on_go_only_once_and_only_after_that_is_recorded() {
        for steps in 0..PREPARED {
            assert!(after(steps).on(GO).is_err(), "GO after {steps} steps");
        }
        let mut handover = after(PREPARED);
        assert_eq!(handover.on(GO), Ok(DestinationAction::Record(RecordKind::Running)));
        assert_eq!(handover.on(DestinationEvent::Recorded(RecordKind::Running)), Ok(DestinationAction::Run));
        assert_eq!(handover.on(DestinationEvent::Started), Ok(DestinationAction::SendRunning));
        assert_eq!(handover.on(GO), Ok(DestinationAction::SendRunning));
        assert_eq!(handover.on(ASKED), Ok(DestinationAction::SendRunning));
        assert_eq!(handover.on(DestinationEvent::Failed), Ok(DestinationAction::Continue));
        assert_eq!(handover.state(), DestinationState::Running);
    }

    #[test]
    fn what_was_given_up_never_runs() {
        for steps in 0..PREPARED - 1 {
            let mut handover = after(steps);
            assert_eq!(handover.on(DestinationEvent::Failed), Ok(DestinationAction::Refuse));
            assert_eq!(handover.on(GO), Ok(DestinationAction::Refuse));
            assert_eq!(handover.state(), DestinationState::Refused);
        }
    }

    #[test]
    fn once_prepared_it_gives_up_only_by_recording_that_first() {
        let given_up = [
            (PREPARED, DestinationEvent::Failed),
            (PREPARED + 1, DestinationEvent::NotRecorded(RecordKind::Running)),
            (PREPARED + 2, DestinationEvent::NotStarted),
        ];
        for (steps, event) in given_up {
            let mut handover = after(steps);
            assert_eq!(handover.on(event), Ok(DestinationAction::Record(RecordKind::Refused)), "{event:?}");
            let unrecorded = DestinationEvent::NotRecorded(RecordKind::Refused);
            assert_eq!(handover.on(unrecorded), Ok(DestinationAction::Discard));
            assert_eq!(
                handover.on(ASKED),
                Ok(DestinationAction::Record(RecordKind::Refused)),
                "it tries again"
            );
            assert_eq!(
                handover.on(DestinationEvent::Recorded(RecordKind::Refused)),
                Ok(DestinationAction::Refuse)
            );
            assert_eq!(handover.on(GO), Ok(DestinationAction::Refuse));
        }
    }

    #[test]
    fn a_question_does_not_end_the_wait_for_go() {
        let mut handover = after(PREPARED);
        assert_eq!(handover.on(ASKED), Ok(DestinationAction::SendPrepared));
        assert_eq!(handover.on(GO), Ok(DestinationAction::Record(RecordKind::Running)));
    }

    #[test]
    fn go_of_another_attempt_is_refused() {
        let mut handover = after(PREPARED);
        assert!(matches!(
            handover.on(DestinationEvent::Go(AttemptId([2; 16]))),
            Err(HandoverError::OtherAttempt { .. })
        ));
        assert_eq!(handover.state(), DestinationState::Prepared);
    }

    #[test]
    fn steps_cannot_be_skipped() {
        for steps in 0..ORDER.len() {
            for &skipped in &ORDER[steps + 1..] {
                let mut handover = after(steps);
                assert!(handover.on(skipped).is_err(), "{steps} → {skipped:?}");
                assert_eq!(handover, after(steps));
            }
        }
    }

    #[test]
    fn an_operators_word_counts_only_when_the_guest_is_ready() {
        for steps in (0..=ORDER.len()).filter(|&steps| steps != PREPARED) {
            assert!(after(steps).on(DestinationEvent::Fenced).is_err(), "after {steps} steps");
        }
        let go = after(PREPARED).on(DestinationEvent::Fenced);
        assert_eq!(go, Ok(DestinationAction::Record(RecordKind::Running)));
    }

    #[test]
    fn after_a_crash_it_knows_what_its_journal_says() {
        let recovered = |last| DestinationHandover::recover(ATTEMPT_ID, last).map(|(_, action)| action);
        assert_eq!(recovered(RecordKind::Prepared), Ok(DestinationAction::Record(RecordKind::Refused)));
        let (mut ran, _) = DestinationHandover::recover(ATTEMPT_ID, RecordKind::Running).unwrap();
        assert_eq!(ran.on(ASKED), Ok(DestinationAction::SendRunning), "also if it runs no more");
        let (mut refused, _) = DestinationHandover::recover(ATTEMPT_ID, RecordKind::Refused).unwrap();
        assert_eq!(refused.on(ASKED), Ok(DestinationAction::Refuse));
        assert!(recovered(RecordKind::Committed).is_err());
    }
}

use super::HandoverError;
use super::journal::RecordKind;
use crate::wire::AttemptId;

/// State of the handover at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// The guest runs at the source.
    Running,
    /// The guest is paused at the source; everything can still be undone.
    Paused,
    /// FINAL is sent.
    AwaitingPrepared,
    /// The destination is prepared; COMMITTED is being recorded. The last state in which the source may still
    /// abort.
    Committing,
    /// COMMITTED is recorded and GO was attempted: the guest may run at the destination.
    AwaitingRunning,
    /// GO was attempted and no answer came. The guest stays paused.
    InDoubt,
    /// In doubt, and the operator states that the destination is fenced. The source asks the destination once
    /// more and sends no GO meanwhile.
    WordPending,
    /// The operator's word is accepted: the destination gave no sign of life. REFUSED is being recorded;
    /// without it the guest stays paused.
    Fencing,
    /// COMMITTED may be on the disk although its write failed, and GO never left. REFUSED is being recorded
    /// after it.
    Withdrawing,
    /// As [`Withdrawing`](Self::Withdrawing), but REFUSED could not be recorded either. The guest stays
    /// paused until REFUSED is durable, or until the destination refuses.
    Withdrawn,
    /// The destination refused durably; the source is recording that.
    TakingBack,
    /// The attempt is over and the source keeps the guest.
    Kept,
    /// The destination runs the guest; the source is recording that.
    Releasing,
    /// The destination runs the guest.
    Released,
}

/// An event at the source, reported by its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The vCPUs are about to be paused.
    Pausing,
    /// FINAL was sent.
    FinalSent,
    /// The destination reports that it is prepared, for the first time or still.
    Prepared(AttemptId),
    /// This record is durable in the journal.
    Recorded(RecordKind),
    /// This record is not in the journal, or its fate is unknown.
    NotRecorded(RecordKind),
    /// The destination reports that it runs the guest, or has run it.
    Running(AttemptId),
    /// The destination reports that it did not run the guest in this attempt, and never will.
    Refused(AttemptId),
    /// A step failed, the link was lost, an answer settles nothing, or the operator cancelled. While a word
    /// is pending: the destination gave no sign of life.
    Failed,
    /// The operator states that the destination's host is fenced: it runs nothing and will not run this
    /// guest.
    Fenced,
    /// The destination gave a sign of life that says nothing about this attempt.
    SignOfLife,
}

/// What the driver must do before it reports another event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Pause the guest, send its remaining pages and state, and FINAL; report [`SourceEvent::FinalSent`].
    SendFinal,
    /// Wait for PREPARED; report [`SourceEvent::Prepared`].
    AwaitPrepared,
    /// Write this record durably; report [`SourceEvent::Recorded`] or [`SourceEvent::NotRecorded`].
    Record(RecordKind),
    /// Send GO. Whether the send succeeds or fails, GO may have arrived.
    SendGo,
    /// Resume the guest at the source.
    Resume,
    /// Destroy the guest: it runs at the destination.
    Release,
    /// Keep the guest paused and ask the destination for the outcome of this attempt, repeatedly, over new
    /// connections. A destination that still waits for GO gets it again.
    Ask,
    /// Ask the destination once for the outcome of this attempt, and send no GO whatever it answers.
    AskOnly,
    /// Keep the guest paused. Tell the destination that this attempt is over, and await its REFUSED; then try
    /// again.
    Withdraw,
}

/// The guest as seen by a VMM that outlived its migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestHere {
    /// The guest runs.
    #[cfg_attr(not(feature = "unstable"), allow(dead_code, reason = "the model of two hosts uses it"))]
    Running,
    /// The guest is paused, and has been since the migration paused it.
    Paused,
    /// The guest ended with its process or its host.
    Gone,
}

/// The source's half of the handover of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceHandover {
    attempt_id: AttemptId,
    state: SourceState,
}

impl SourceHandover {
    /// Starts an attempt.
    #[must_use]
    pub fn new(attempt_id: AttemptId) -> Self {
        Self { attempt_id, state: SourceState::Running }
    }

    /// Resumes from the last record of the source's journal after a crash. Without a record nothing has to be
    /// resumed: no guest was handed over.
    ///
    /// # Errors
    /// [`HandoverError::OtherSide`] for a record that no source writes.
    pub fn recover(
        attempt_id: AttemptId,
        last: RecordKind,
        guest: GuestHere,
    ) -> Result<(Self, SourceAction), HandoverError> {
        use {SourceAction as Do, SourceState as S};
        let (state, action) = match (last, guest) {
            // A guest runs only if it was not handed over, whatever a failing disk has kept.
            (RecordKind::Committed, GuestHere::Running) => (S::Withdrawing, Do::Record(RecordKind::Refused)),
            (RecordKind::Committed, GuestHere::Paused | GuestHere::Gone) => (S::InDoubt, Do::Ask),
            (RecordKind::Refused | RecordKind::Started, _) => (S::Kept, Do::Resume),
            (RecordKind::Done, _) => (S::Released, Do::Release),
            (RecordKind::Prepared | RecordKind::Running, _) => return Err(HandoverError::OtherSide(last)),
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
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event and returns the action for the driver.
    ///
    /// # Errors
    /// [`HandoverError`] if the event is not allowed in this state; the state does not change.
    pub fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        use {SourceAction as Do, SourceEvent as E, SourceState as S};
        if let E::Prepared(got) | E::Running(got) | E::Refused(got) = event
            && got != self.attempt_id
        {
            return Err(HandoverError::OtherAttempt { ours: self.attempt_id, got });
        }
        let (state, action) = match (self.state, event) {
            (S::Running, E::Pausing) => (S::Paused, Do::SendFinal),
            (S::Paused, E::FinalSent) => (S::AwaitingPrepared, Do::AwaitPrepared),
            (S::AwaitingPrepared, E::Prepared(_)) => (S::Committing, Do::Record(RecordKind::Committed)),
            // Nothing was promised yet.
            (S::Running | S::Paused | S::AwaitingPrepared, E::Failed | E::Refused(_)) => {
                (S::Kept, Do::Resume)
            }
            (S::Committing, E::Recorded(RecordKind::Committed)) => (S::AwaitingRunning, Do::SendGo),
            // COMMITTED may still be on the disk: after a crash it would hand the destination a guest that
            // has since run on at the source.
            (S::Committing, E::NotRecorded(RecordKind::Committed))
            | (S::Withdrawn, E::Failed | E::Prepared(_) | E::Fenced | E::SignOfLife) => {
                (S::Withdrawing, Do::Record(RecordKind::Refused))
            }
            (S::Withdrawing, E::Recorded(RecordKind::Refused)) => (S::Kept, Do::Resume),
            (S::Withdrawing, E::NotRecorded(RecordKind::Refused)) => (S::Withdrawn, Do::Withdraw),
            (S::AwaitingRunning | S::InDoubt | S::WordPending | S::Withdrawn, E::Running(_)) => {
                (S::Releasing, Do::Record(RecordKind::Done))
            }
            (S::AwaitingRunning | S::InDoubt | S::WordPending | S::Withdrawn, E::Refused(_)) => {
                (S::TakingBack, Do::Record(RecordKind::Refused))
            }
            // Ask the destination first: an operator's word that it contradicts is false.
            (S::InDoubt, E::Fenced) => (S::WordPending, Do::AskOnly),
            (S::WordPending, E::Prepared(_) | E::SignOfLife) => (S::InDoubt, Do::Ask),
            (S::WordPending, E::Failed) => (S::Fencing, Do::Record(RecordKind::Refused)),
            (S::Fencing, E::Recorded(RecordKind::Refused)) => (S::Kept, Do::Resume),
            // After a crash the source would send GO to the destination, which may be back by then.
            (S::Fencing, E::NotRecorded(RecordKind::Refused)) => (S::InDoubt, Do::Ask),
            // GO was lost, and the guest has not run since.
            (state @ (S::AwaitingRunning | S::InDoubt), E::Prepared(_)) => (state, Do::SendGo),
            (S::AwaitingRunning | S::InDoubt, E::Failed | E::SignOfLife) => (S::InDoubt, Do::Ask),
            // REFUSED is durable at the destination, whether or not the source can record it.
            (S::TakingBack, E::Recorded(RecordKind::Refused) | E::NotRecorded(RecordKind::Refused)) => {
                (S::Kept, Do::Resume)
            }
            (S::Releasing, E::Recorded(RecordKind::Done) | E::NotRecorded(RecordKind::Done)) => {
                (S::Released, Do::Release)
            }
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
            Self::Committing => "recording COMMITTED",
            Self::AwaitingRunning => "awaiting RUNNING",
            Self::InDoubt => "in doubt",
            Self::WordPending => "in doubt, with an operator's word pending",
            Self::Fencing => "recording an operator's word",
            Self::Withdrawing => "withdrawing",
            Self::Withdrawn => "withdrawn without a record",
            Self::TakingBack => "taking back",
            Self::Kept => "kept at the source",
            Self::Releasing => "releasing",
            Self::Released => "released",
        }
    }
}

impl SourceEvent {
    fn name(self) -> &'static str {
        match self {
            Self::Pausing => "pausing",
            Self::FinalSent => "FINAL sent",
            Self::Prepared(_) => "PREPARED",
            Self::Recorded(_) => "recorded",
            Self::NotRecorded(_) => "not recorded",
            Self::Running(_) => "RUNNING",
            Self::Refused(_) => "REFUSED",
            Self::Failed => "failure",
            Self::Fenced => "the other host is fenced",
            Self::SignOfLife => "a sign of life",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);
    const ORDER: [SourceEvent; 6] = [
        SourceEvent::Pausing,
        SourceEvent::FinalSent,
        SourceEvent::Prepared(ATTEMPT_ID),
        SourceEvent::Recorded(RecordKind::Committed),
        SourceEvent::Running(ATTEMPT_ID),
        SourceEvent::Recorded(RecordKind::Done),
    ];
    /// The number of steps before GO may leave.
    const GO: usize = 4;

    fn after(steps: usize) -> SourceHandover {
        let mut handover = SourceHandover::new(ATTEMPT_ID);
        for &event in &ORDER[..steps] {
            handover.on(event).unwrap();
        }
        handover
    }

    #[test]
    fn in_order_it_commits_gives_the_guest_away_and_releases_it() {
        assert_eq!(after(2).on(ORDER[2]), Ok(SourceAction::Record(RecordKind::Committed)));
        assert_eq!(after(3).on(ORDER[3]), Ok(SourceAction::SendGo));
        assert_eq!(after(4).on(ORDER[4]), Ok(SourceAction::Record(RecordKind::Done)));
        for done in [SourceEvent::Recorded(RecordKind::Done), SourceEvent::NotRecorded(RecordKind::Done)] {
            assert_eq!(after(5).on(done), Ok(SourceAction::Release));
        }
    }

    #[test]
    fn a_failure_resumes_the_guest_until_it_is_committed_and_never_after() {
        for steps in 0..GO - 1 {
            assert_eq!(after(steps).on(SourceEvent::Failed), Ok(SourceAction::Resume), "after {steps} steps");
        }
        let mut handover = after(GO);
        for _ in 0..3 {
            assert_eq!(handover.on(SourceEvent::Failed), Ok(SourceAction::Ask));
        }
        assert_eq!(handover.state(), SourceState::InDoubt);
        assert!(after(6).on(SourceEvent::Failed).is_err(), "a released guest does not come back");
    }

    /// A handover after a failed write of COMMITTED.
    fn unsure() -> SourceHandover {
        let mut handover = after(3);
        let action = handover.on(SourceEvent::NotRecorded(RecordKind::Committed));
        assert_eq!(action, Ok(SourceAction::Record(RecordKind::Refused)));
        handover
    }

    #[test]
    fn without_committed_in_the_journal_go_does_not_leave_and_refused_is_recorded_before_the_guest_runs() {
        assert_eq!(unsure().on(SourceEvent::Recorded(RecordKind::Refused)), Ok(SourceAction::Resume));
        let not_recorded = SourceEvent::NotRecorded(RecordKind::Refused);
        assert_eq!(unsure().on(not_recorded), Ok(SourceAction::Withdraw));
        let again = [
            SourceEvent::Failed,
            SourceEvent::SignOfLife,
            SourceEvent::Fenced,
            SourceEvent::Prepared(ATTEMPT_ID),
        ];
        for event in again {
            let mut handover = unsure();
            handover.on(not_recorded).unwrap();
            assert_eq!(handover.on(event), Ok(SourceAction::Record(RecordKind::Refused)), "{event:?}");
            assert_eq!(handover.on(not_recorded), Ok(SourceAction::Withdraw), "{event:?}");
            // The destination's own record suffices.
            assert_eq!(
                handover.on(SourceEvent::Refused(ATTEMPT_ID)),
                Ok(SourceAction::Record(RecordKind::Refused))
            );
            assert_eq!(handover.on(not_recorded), Ok(SourceAction::Resume));
        }
    }

    #[test]
    fn only_the_destinations_word_of_this_epoch_settles_a_doubt() {
        let other = AttemptId([2; 16]);
        let mut handover = after(GO);
        handover.on(SourceEvent::Failed).unwrap();
        for event in [SourceEvent::Refused(other), SourceEvent::Running(other), SourceEvent::Prepared(other)]
        {
            assert_eq!(handover.on(event), Err(HandoverError::OtherAttempt { ours: ATTEMPT_ID, got: other }));
        }
        assert_eq!(handover.clone().on(SourceEvent::Prepared(ATTEMPT_ID)), Ok(SourceAction::SendGo));
        assert_eq!(
            handover.clone().on(SourceEvent::Refused(ATTEMPT_ID)),
            Ok(SourceAction::Record(RecordKind::Refused))
        );
        assert_eq!(handover.on(SourceEvent::Running(ATTEMPT_ID)), Ok(SourceAction::Record(RecordKind::Done)));
    }

    /// A handover in doubt, with an operator's word pending.
    fn word_pending() -> SourceHandover {
        let mut handover = after(GO);
        handover.on(SourceEvent::Failed).unwrap();
        assert_eq!(handover.on(SourceEvent::Fenced), Ok(SourceAction::AskOnly));
        handover
    }

    #[test]
    fn an_operators_word_counts_only_in_doubt_and_only_where_the_destination_is_silent() {
        for steps in 0..=6 {
            assert!(after(steps).on(SourceEvent::Fenced).is_err(), "after {steps} steps");
        }
        let mut silent = word_pending();
        assert_eq!(silent.on(SourceEvent::Failed), Ok(SourceAction::Record(RecordKind::Refused)));
        assert_eq!(silent.clone().on(SourceEvent::Recorded(RecordKind::Refused)), Ok(SourceAction::Resume));
        assert_eq!(silent.on(SourceEvent::NotRecorded(RecordKind::Refused)), Ok(SourceAction::Ask));
        assert_eq!(silent.state(), SourceState::InDoubt, "a word that is not recorded is not taken");
    }

    #[test]
    fn a_sign_of_life_voids_an_operators_word_and_no_go_answers_it() {
        for event in [SourceEvent::Prepared(ATTEMPT_ID), SourceEvent::SignOfLife] {
            let mut handover = word_pending();
            assert_eq!(handover.on(event), Ok(SourceAction::Ask), "{event:?}");
            assert_eq!(handover.state(), SourceState::InDoubt);
            assert_eq!(handover.on(SourceEvent::Failed), Ok(SourceAction::Ask), "the word is gone");
        }
        let said = [
            (SourceEvent::Running(ATTEMPT_ID), RecordKind::Done, SourceAction::Release),
            (SourceEvent::Refused(ATTEMPT_ID), RecordKind::Refused, SourceAction::Resume),
        ];
        for (event, mark, then) in said {
            let mut handover = word_pending();
            assert_eq!(handover.on(event), Ok(SourceAction::Record(mark)));
            assert_eq!(handover.on(SourceEvent::NotRecorded(mark)), Ok(then));
        }
    }

    #[test]
    fn steps_cannot_be_skipped() {
        for steps in 0..ORDER.len() {
            for &skipped in &ORDER[steps + 1..] {
                let mut handover = after(steps);
                assert!(
                    matches!(handover.on(skipped), Err(HandoverError::OutOfTurn { .. })),
                    "{steps} → {skipped:?}"
                );
                assert_eq!(handover, after(steps));
            }
        }
    }

    #[test]
    fn after_a_crash_it_knows_what_its_journal_says() {
        let recovered =
            |last, guest| SourceHandover::recover(ATTEMPT_ID, last, guest).map(|(_, action)| action);
        assert_eq!(recovered(RecordKind::Committed, GuestHere::Paused), Ok(SourceAction::Ask));
        assert_eq!(recovered(RecordKind::Committed, GuestHere::Gone), Ok(SourceAction::Ask));
        assert_eq!(
            recovered(RecordKind::Committed, GuestHere::Running),
            Ok(SourceAction::Record(RecordKind::Refused)),
            "or GO could leave for a guest that runs here"
        );
        assert_eq!(recovered(RecordKind::Refused, GuestHere::Paused), Ok(SourceAction::Resume));
        assert_eq!(recovered(RecordKind::Done, GuestHere::Paused), Ok(SourceAction::Release));
        assert!(recovered(RecordKind::Running, GuestHere::Paused).is_err());
    }
}

//! The ownership of the guest as its source knows it: the handover's state machine, its records, and the
//! questions that settle a doubt.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sterna_trust::Fingerprint;

use super::verdict::{OpenError, StillInDoubt, Verdict};
use crate::control::{ControlChannel, ControlError, STEP_MAX, Security};
use crate::handover::{
    GuestHere, HandoverError, Record, RecordKind, Side, SourceAction, SourceEvent, SourceHandover,
    SourceState,
};
use crate::lock::{LOCK_MAX, Lock, LockError};
use crate::session::AttemptRecords;
use crate::state::{GuestClaim, RecordWriter, StateError};
use crate::wire::{AttemptId, Message, Outcome};

/// The source's half of one handover; it writes the records that the state machine asks for.
#[derive(Debug)]
pub(super) struct DurableHandover {
    handover: SourceHandover,
    records: AttemptRecords,
    peer: Peer,
    /// How the connections that settle a doubt are protected.
    security: Security,
    /// The lock that arbitrates between the hosts.
    lock: Option<Lock>,
}

/// The destination.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// As `HOST:PORT`.
    pub(super) name: String,
    /// The address that answered: the name may resolve to another host the next time.
    pub(super) address: Option<SocketAddr>,
    /// The key that it has proved, if the attempt began with TLS: no other host may answer.
    pub(super) identity: Option<Fingerprint>,
}

/// Opens the records of a guest that runs on this host. The running guest proves that no earlier attempt gave
/// it away, whatever a failing disk has kept from that attempt.
pub(super) fn open_records(claim: &GuestClaim) -> Result<RecordWriter, OpenError> {
    let records = claim.writer()?;
    if let Some(last) = records.last().filter(|last| last.mark == RecordKind::Committed) {
        records.append(Record { mark: RecordKind::Refused, ..last })?;
    }
    Ok(records)
}

impl DurableHandover {
    pub(super) fn new(
        records: RecordWriter,
        peer: Peer,
        attempt_id: AttemptId,
        (security, lock): (Security, Option<Lock>),
    ) -> Self {
        let (handover, records) = (SourceHandover::new(attempt_id), AttemptRecords::new(records));
        Self { handover, records, peer, security, lock }
    }

    /// Releases the lock before GO is sent: the next host to run the guest must get it.
    pub(super) fn give_lock_up(&self) {
        if let Some(lock) = &self.lock {
            lock.give_up();
        }
    }

    /// Takes the lock before the guest runs on this host again.
    pub(super) fn take_lock(&self) -> Result<(), LockError> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.take_within(LOCK_MAX))
    }

    /// Begins another attempt for a guest that has not stopped running on this host.
    pub(super) fn begin_anew(&mut self, attempt_id: AttemptId) -> Result<(), HandoverError> {
        if self.state() != SourceState::Running {
            return Err(HandoverError::OtherAction);
        }
        self.handover = SourceHandover::new(attempt_id);
        Ok(())
    }

    /// How long a record takes.
    pub(super) fn record_time(&self) -> Duration {
        self.records.record_time()
    }

    /// A step failed midway. COMMITTED may be recorded, so the guest counts as given away.
    pub(super) fn presume_committed(&mut self) {
        let attempt_id = self.handover.attempt_id();
        if let Ok((handover, _)) =
            SourceHandover::recover(attempt_id, RecordKind::Committed, GuestHere::Paused)
        {
            self.handover = handover;
        }
    }

    /// The handover of a guest that was given away by a process that has ended.
    pub(super) fn recover(
        last: Record,
        records: RecordWriter,
        (security, lock): (Security, Option<Lock>),
    ) -> Result<Self, HandoverError> {
        let (handover, _) = SourceHandover::recover(last.attempt_id, last.mark, GuestHere::Gone)?;
        let peer = Peer { name: last.peer, address: last.address, identity: last.identity };
        Ok(Self { handover, records: AttemptRecords::new(records), peer, security, lock })
    }

    /// The destination, as `HOST:PORT`.
    pub(super) fn peer(&self) -> &str {
        &self.peer.name
    }

    pub(super) fn state(&self) -> SourceState {
        self.handover.state()
    }

    /// Reports an event to the state machine and writes the records that it asks for; returns the next
    /// action.
    pub(super) fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        let mut action = self.handover.on(event)?;
        while let SourceAction::Record(mark) = action {
            let (attempt_id, Peer { name, address, identity }) =
                (self.handover.attempt_id(), self.peer.clone());
            let record = Record { mark, side: Side::Source, attempt_id, peer: name, address, identity };
            let (recorded, not_recorded) = (SourceEvent::Recorded, SourceEvent::NotRecorded);
            action = self.handover.on(self.records.write(record, recorded, not_recorded))?;
        }
        Ok(action)
    }

    /// Why a record could not be written.
    pub(super) fn take_unrecorded(&mut self) -> Option<StateError> {
        self.records.take_unrecorded()
    }

    /// RUNNING was received and recorded: the destination need not remember the guest for this side.
    pub(super) fn send_done(&self, control: &mut ControlChannel) {
        if self.records.none_failed() {
            // The destination may be gone. This side asks no more in any case.
            let _ = control.send(&Message::Done(self.handover.attempt_id()));
        }
    }

    /// Tries to settle the doubt by one more question. A destination that is still ready receives GO, or
    /// Abort if GO was never sent.
    pub(super) fn ask(&mut self) -> Verdict {
        let action = match self.state() {
            SourceState::Kept => Ok(SourceAction::Resume),
            SourceState::Released => Ok(SourceAction::Release),
            // GO was never sent: perhaps that can be recorded by now.
            SourceState::Withdrawn => self.on(SourceEvent::Failed),
            _ => Ok(SourceAction::Ask),
        };
        let settled = action.map_err(StillInDoubt::from).and_then(|action| self.carry_out(action));
        self.verdict(settled)
    }

    /// Asks over a new connection if that is the machine's next action; returns the action after it.
    fn carry_out(&mut self, action: SourceAction) -> Result<SourceAction, StillInDoubt> {
        if !matches!(action, SourceAction::Ask | SourceAction::Withdraw) {
            return Ok(action);
        }
        let attempt_id = self.handover.attempt_id();
        let (mut control, answer) = self.question()?;
        if answer != Message::Outcome(attempt_id, Outcome::Prepared) {
            return self.settle_by(answer, &mut control);
        }
        if action == SourceAction::Withdraw {
            return self.withdraw_over(&mut control);
        }
        match self.on(SourceEvent::Prepared(attempt_id))? {
            SourceAction::SendGo => {
                self.give_lock_up();
                control.send(&Message::Go(attempt_id))?;
                let answer = control.receive("RUNNING", Some(STEP_MAX))?;
                self.settle_by(answer, &mut control)
            }
            action => Ok(action),
        }
    }

    pub(super) fn verdict(&self, settled: Result<SourceAction, StillInDoubt>) -> Verdict {
        match settled {
            Ok(SourceAction::Release) => Verdict::Moved,
            Ok(SourceAction::Resume) => {
                self.take_lock().map_or_else(|error| Verdict::Open(error.into()), |()| Verdict::Kept)
            }
            Ok(_) => Verdict::Open(HandoverError::OtherAction.into()),
            Err(why) => Verdict::Open(why),
        }
    }

    /// The same, repeated for this time.
    pub(super) fn ask_for(&mut self, time: Duration) -> Verdict {
        let deadline = Instant::now() + time;
        let mut pause = Duration::from_millis(50);
        loop {
            let verdict = self.ask();
            let left = deadline.saturating_duration_since(Instant::now());
            if !matches!(verdict, Verdict::Open(_)) || left.is_zero() {
                return verdict;
            }
            std::thread::sleep(pause.min(left));
            pause = (2 * pause).min(Duration::from_secs(1));
        }
    }

    /// GO was never sent: makes the destination refuse, which waits on this connection.
    pub(super) fn withdraw_over(
        &mut self,
        control: &mut ControlChannel,
    ) -> Result<SourceAction, StillInDoubt> {
        control.send(&Message::Abort(self.handover.attempt_id(), WITHDRAWN.into()))?;
        let answer = control.receive("REFUSED", Some(STEP_MAX))?;
        self.settle_by(answer, control)
    }

    /// Takes the operator's word that the destination is fenced. The source asks the destination once,
    /// without sending GO: an answer counts, and any sign of life voids the word.
    pub(super) fn take_word(&mut self) -> Result<SourceAction, StillInDoubt> {
        let (event, why) = match self.on(SourceEvent::Fenced)? {
            SourceAction::AskOnly => match self.question() {
                Ok((mut control, answer)) => {
                    return match self.settle_by(answer, &mut control) {
                        Ok(action) => Ok(action),
                        Err(why) => Err(self.void_word(&why)),
                    };
                }
                Err(error) if is_sign_of_life(&error) => (SourceEvent::SignOfLife, Some(error)),
                Err(_) => (SourceEvent::Failed, None),
            },
            // GO was never sent: a record is missing, and no word replaces it.
            SourceAction::Resume => return Ok(SourceAction::Resume),
            _ => return Err(self.unrecorded_or_defect()),
        };
        match (self.on(event)?, why) {
            (SourceAction::Resume, _) => Ok(SourceAction::Resume),
            (SourceAction::Ask, Some(error)) => Err(StillInDoubt::Contradicted(error.to_string())),
            _ => Err(self.unrecorded_or_defect()),
        }
    }

    /// The destination gave an answer that settles nothing.
    fn void_word(&mut self, why: &StillInDoubt) -> StillInDoubt {
        if self.state() == SourceState::WordPending
            && let Err(error) = self.on(SourceEvent::SignOfLife)
        {
            return error.into();
        }
        StillInDoubt::Contradicted(why.to_string())
    }

    fn unrecorded_or_defect(&mut self) -> StillInDoubt {
        self.take_unrecorded().map_or(HandoverError::OtherAction.into(), StillInDoubt::Unrecorded)
    }

    /// Asks for the outcome of this attempt, over a new connection.
    fn question(&self) -> Result<(ControlChannel, Message), ControlError> {
        let address = self.peer.address.map_or_else(|| self.peer.name.clone(), |address| address.to_string());
        let by = (&self.security, self.peer.identity);
        let mut control = ControlChannel::connect_within(&address, by, (ANSWER_MAX, ANSWER_MAX))?;
        control.send(&Message::Ask(self.handover.attempt_id()))?;
        let answer = control.receive("word of the guest", Some(ANSWER_MAX))?;
        Ok((control, answer))
    }

    /// Applies the destination's answer, if it settles anything.
    fn settle_by(
        &mut self,
        answer: Message,
        control: &mut ControlChannel,
    ) -> Result<SourceAction, StillInDoubt> {
        let attempt_id = self.handover.attempt_id();
        match answer {
            Message::Running(of) | Message::Outcome(of, Outcome::Running) => {
                let action = self.on(SourceEvent::Running(of))?;
                if action == SourceAction::Release {
                    self.send_done(control);
                }
                Ok(action)
            }
            Message::Abort(of, _) | Message::Outcome(of, Outcome::Refused) => {
                Ok(self.on(SourceEvent::Refused(of))?)
            }
            Message::Outcome(of, Outcome::Prepared) if of == attempt_id => Err(StillInDoubt::Ready),
            Message::Outcome(of, Outcome::Unknown) if of == attempt_id => Err(StillInDoubt::NoWord),
            Message::Refused(refusal) => Err(StillInDoubt::NotAnswered(refusal)),
            other => {
                Err(ControlError::Unexpected { expected: "word of the guest", got: other.name() }.into())
            }
        }
    }
}

/// Whether a failed question has shown that the destination's host lives: it accepted the connection. A
/// refused connection shows only that the host has restarted since, which a fenced host may do.
fn is_sign_of_life(error: &ControlError) -> bool {
    !matches!(error, ControlError::Resolve { .. } | ControlError::Connect { .. })
}

/// How long a destination may take for each part of an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

const WITHDRAWN: &str = "the source could not record that it gives the guest away, and keeps it";

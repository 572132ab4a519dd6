//! Whose the guest is, as its source sees it: the handover's machine, its records, and the questions that settle a doubt.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::control::{ControlChannel, ControlError, STEP_MAX};
use crate::handover::{
    GuestHere, HandoverError, Record, RecordKind, Side, SourceAction, SourceEvent, SourceHandover,
    SourceState,
};
use crate::lock::{LOCK_MAX, Lock, LockError};
use crate::state::{GuestClaim, HostState, RecordWriter, StateError};
use crate::wire::{AttemptId, Message, Outcome};

/// The source's half of one handover; what the machine wants recorded is recorded.
#[derive(Debug)]
pub(super) struct DurableHandover {
    handover: SourceHandover,
    records: RecordWriter,
    peer: Peer,
    /// What arbitrates between the hosts.
    lock: Option<Lock>,
    /// Why a record could not be written.
    unrecorded: Option<StateError>,
}

/// The destination.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// As `HOST:PORT`.
    pub(super) name: String,
    /// The address that answered: the name may stand for another host the next time.
    pub(super) address: Option<SocketAddr>,
}

/// Opens the records of a guest that runs here. That it runs is the proof that no earlier attempt gave it away, whatever a disk that
/// fails has kept of that one.
pub(super) fn open_records(claim: &GuestClaim) -> Result<RecordWriter, OpenError> {
    let records = claim.writer()?;
    if let Some(last) = records.last().filter(|last| last.mark == RecordKind::Committed) {
        records.append(Record { mark: RecordKind::Refused, ..last })?;
    }
    Ok(records)
}

impl DurableHandover {
    pub(super) fn new(records: RecordWriter, peer: Peer, attempt_id: AttemptId, lock: Option<Lock>) -> Self {
        Self { handover: SourceHandover::new(attempt_id), records, peer, lock, unrecorded: None }
    }

    /// GO is about to leave: whoever runs the guest from now on must get the lock.
    pub(super) fn give_lock_up(&self) {
        if let Some(lock) = &self.lock {
            lock.give_up();
        }
    }

    /// Before the guest runs here again.
    pub(super) fn take_lock(&self) -> Result<(), LockError> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.take_within(LOCK_MAX))
    }

    /// Another attempt, of a guest that has not stopped running here.
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

    pub(super) fn state(&self) -> SourceState {
        self.handover.state()
    }

    /// Reports an event to the handover, and records what it wants recorded; returns what is to be done then.
    pub(super) fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        let mut action = self.handover.on(event)?;
        while let SourceAction::Record(mark) = action {
            let recorded = self.record(mark);
            action = self.handover.on(recorded)?;
        }
        Ok(action)
    }

    fn record(&mut self, mark: RecordKind) -> SourceEvent {
        let (attempt_id, peer) = (self.handover.attempt_id(), &self.peer);
        let record =
            Record { mark, side: Side::Source, attempt_id, peer: peer.name.clone(), address: peer.address };
        match self.records.append(record) {
            Ok(()) => SourceEvent::Recorded(mark),
            Err(error) => {
                tracing::error!("{mark} is not recorded: {error}");
                // The first says what is wrong; those that follow from it do not.
                self.unrecorded.get_or_insert(error);
                SourceEvent::NotRecorded(mark)
            }
        }
    }

    /// Why something could not be recorded.
    pub(super) fn take_unrecorded(&mut self) -> Option<StateError> {
        self.unrecorded.take()
    }

    /// RUNNING was heard: the guest is the destination's, which need not remember it for this side.
    pub(super) fn release(
        &mut self,
        attempt_id: AttemptId,
        control: &mut ControlChannel,
    ) -> Result<(), HandoverError> {
        if self.on(SourceEvent::Running(attempt_id))? != SourceAction::Release {
            return Err(HandoverError::OtherAction);
        }
        if self.unrecorded.is_none() {
            // It may be gone. Then it is asked no more all the same.
            let _ = control.send(&Message::Done(attempt_id));
        }
        Ok(())
    }

    /// Settles it by one more question, if that settles it. A destination that is still ready gets GO, or is told that the attempt
    /// is over where GO never left.
    pub(super) fn ask(&mut self) -> Verdict {
        let settled = match self.state() {
            SourceState::Kept => Ok(SourceAction::Resume),
            SourceState::Released => Ok(SourceAction::Release),
            SourceState::Withdrawn => self.withdraw(),
            _ => self.ask_and_give(),
        };
        self.verdict(settled)
    }

    fn verdict(&self, settled: Result<SourceAction, StillInDoubt>) -> Verdict {
        match settled {
            Ok(SourceAction::Release) => Verdict::Moved,
            Ok(SourceAction::Resume) => {
                self.take_lock().map_or_else(|error| Verdict::Open(error.into()), |()| Verdict::Kept)
            }
            Ok(_) => Verdict::Open(HandoverError::OtherAction.into()),
            Err(why) => Verdict::Open(why),
        }
    }

    /// The same, again and again for a while.
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

    /// In doubt: asks, and gives the guest away again if the destination still waits for that.
    fn ask_and_give(&mut self) -> Result<SourceAction, StillInDoubt> {
        let attempt_id = self.handover.attempt_id();
        let (mut control, mut answer) = self.question()?;
        if answer == Message::Outcome(attempt_id, Outcome::Prepared) {
            if self.on(SourceEvent::Prepared(attempt_id))? != SourceAction::SendGo {
                return Err(HandoverError::OtherAction.into());
            }
            self.give_lock_up();
            control.send(&Message::Go(attempt_id))?;
            answer = control.receive("RUNNING", Some(STEP_MAX))?;
        }
        self.settle_by(answer, &mut control)
    }

    /// GO never left: records that, or has the destination refuse.
    fn withdraw(&mut self) -> Result<SourceAction, StillInDoubt> {
        if self.on(SourceEvent::Failed)? == SourceAction::Resume {
            return Ok(SourceAction::Resume);
        }
        let attempt_id = self.handover.attempt_id();
        let (mut control, mut answer) = self.question()?;
        if answer == Message::Outcome(attempt_id, Outcome::Prepared) {
            control.send(&Message::Abort(attempt_id, WITHDRAWN.into()))?;
            answer = control.receive("REFUSED", Some(STEP_MAX))?;
        }
        self.settle_by(answer, &mut control)
    }

    /// The same, of a destination that still waits on the connection of the attempt.
    pub(super) fn withdraw_over(
        &mut self,
        control: &mut ControlChannel,
    ) -> Result<SourceAction, StillInDoubt> {
        control.send(&Message::Abort(self.handover.attempt_id(), WITHDRAWN.into()))?;
        let answer = control.receive("REFUSED", Some(STEP_MAX))?;
        self.settle_by(answer, control)
    }

    /// The operator's word that the destination is fenced. The destination is asked once, and gets no GO: its answer counts, and
    /// any sign of its life voids the word.
    fn take_word(&mut self) -> Result<SourceAction, StillInDoubt> {
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
            // GO never left: what is missing is a record, and no word replaces that.
            SourceAction::Resume => return Ok(SourceAction::Resume),
            _ => return Err(self.unrecorded_or_defect()),
        };
        match (self.on(event)?, why) {
            (SourceAction::Resume, _) => Ok(SourceAction::Resume),
            (SourceAction::Ask, Some(error)) => Err(StillInDoubt::Contradicted(error.to_string())),
            _ => Err(self.unrecorded_or_defect()),
        }
    }

    /// The destination answered something that settles nothing.
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

    /// Asks what became of this attempt, over a new connection.
    fn question(&self) -> Result<(ControlChannel, Message), ControlError> {
        let address = self.peer.address.map_or_else(|| self.peer.name.clone(), |address| address.to_string());
        let mut control = ControlChannel::connect_within(&address, ANSWER_MAX, ANSWER_MAX)?;
        control.send(&Message::Ask(self.handover.attempt_id()))?;
        let answer = control.receive("word of the guest", Some(ANSWER_MAX))?;
        Ok((control, answer))
    }

    /// What the destination's answer means, if it settles anything.
    fn settle_by(
        &mut self,
        answer: Message,
        control: &mut ControlChannel,
    ) -> Result<SourceAction, StillInDoubt> {
        let attempt_id = self.handover.attempt_id();
        match answer {
            Message::Running(of) | Message::Outcome(of, Outcome::Running) => {
                self.release(of, control)?;
                Ok(SourceAction::Release)
            }
            Message::Abort(of, _) | Message::Outcome(of, Outcome::Refused) => {
                Ok(self.on(SourceEvent::Refused(of))?)
            }
            Message::Outcome(of, Outcome::Prepared) if of == attempt_id => Err(StillInDoubt::Ready),
            Message::Outcome(of, Outcome::Unknown) if of == attempt_id => Err(StillInDoubt::NoWord),
            other => {
                Err(ControlError::Unexpected { expected: "word of the guest", got: other.name() }.into())
            }
        }
    }

    /// After a failure whose outcome is unknown.
    pub(super) fn into_doubt(mut self) -> Doubt {
        if !matches!(self.state(), SourceState::InDoubt | SourceState::Withdrawn | SourceState::Kept) {
            // Something failed in the middle of a step. COMMITTED may be recorded, so it counts as that.
            let attempt_id = self.handover.attempt_id();
            if let Ok((handover, _)) =
                SourceHandover::recover(attempt_id, RecordKind::Committed, GuestHere::Paused)
            {
                self.handover = handover;
            }
        }
        Doubt(self)
    }
}

/// Whether a question that failed has shown that the destination's host lives: it took the connection. That a host refuses one
/// shows only that it has started again since, which a fenced host may have.
fn is_sign_of_life(error: &ControlError) -> bool {
    !matches!(error, ControlError::Resolve { .. } | ControlError::Connect { .. })
}

/// A guest that was given away, without an answer whether it arrived; or one whose handover failed so that it cannot be recorded as
/// kept. It stays paused, and the destination is asked until it answers. Whoever holds this keeps the guest's state claimed.
#[derive(Debug)]
pub struct Doubt(DurableHandover);

impl Doubt {
    /// The doubt that the records of a host tell of, of a guest that ended with its process or host after COMMITTED was written;
    /// `None` if they tell of none. To ask is worth while all the same: a destination that still waits gets its GO. With a `lock`
    /// the guest counts as kept only once that could be taken.
    ///
    /// # Errors
    /// [`OpenError`], also if the process that has the guest is alive: that one asks.
    pub fn recover(state: &HostState, name: &str, lock: Option<Lock>) -> Result<Option<Self>, OpenError> {
        let seen = state.look(name)?.and_then(|sighting| sighting.journal.last().cloned());
        if seen.is_none_or(|last| last.mark != RecordKind::Committed) {
            return Ok(None);
        }
        Self::of(&state.claim(name)?, lock)
    }

    /// The same, of a guest whose name this process has claimed, and which has stood still since it was given away.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn of(claim: &GuestClaim, lock: Option<Lock>) -> Result<Option<Self>, OpenError> {
        let records = claim.writer()?;
        let Some(last) = records.last().filter(|last| last.mark == RecordKind::Committed) else {
            return Ok(None);
        };
        let (handover, _) = SourceHandover::recover(last.attempt_id, last.mark, GuestHere::Gone)?;
        let peer = Peer { name: last.peer, address: last.address };
        Ok(Some(Self(DurableHandover { handover, records, peer, lock, unrecorded: None })))
    }

    /// The destination, as `HOST:PORT`.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.0.peer.name
    }

    /// Asks the destination once, which takes some seconds where it does not answer. A destination that still waits for the guest is
    /// told to run it.
    ///
    /// On [`Verdict::Kept`], when its lock is held again too, resume the guest; on [`Verdict::Moved`] destroy it. The verdict stays
    /// what it was once it is one of those.
    pub fn ask(&mut self) -> Verdict {
        self.0.ask()
    }

    /// The same, again and again for a while: the destination may be busy for a moment.
    pub fn ask_for(&mut self, time: Duration) -> Verdict {
        self.0.ask_for(time)
    }

    /// The operator's word that the destination's host is fenced: it is off, or can reach neither disks nor network, and will not
    /// run this guest. The destination is asked first, and is given nothing; its answer counts, and any sign of its life voids the
    /// word. **If the word is false and the destination silent, the guest runs twice.**
    ///
    /// [`Verdict::Kept`]: resume the guest. [`Verdict::Open`] with [`StillInDoubt::Contradicted`]: the word was false. With
    /// [`StillInDoubt::Lock`]: another process holds the guest's lock, so the word cannot be true. With
    /// [`StillInDoubt::Unrecorded`]: it could not be recorded, and so does not count.
    pub fn fenced(&mut self) -> Verdict {
        if matches!(self.0.state(), SourceState::Kept | SourceState::Released) {
            return self.0.ask();
        }
        if let Err(error) = self.0.take_lock() {
            return Verdict::Open(error.into());
        }
        let verdict = match self.0.take_word() {
            Ok(action) => self.0.verdict(Ok(action)),
            Err(why) => Verdict::Open(why),
        };
        if !matches!(verdict, Verdict::Kept) {
            self.0.give_lock_up();
        }
        verdict
    }
}

/// What became of a guest in doubt.
#[derive(Debug)]
pub enum Verdict {
    /// It runs, or has run, at the destination: it must not run here again.
    Moved,
    /// It never ran there and never will: it is the source's.
    Kept,
    /// Not known yet.
    Open(StillInDoubt),
}

/// Why a doubt is not settled.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StillInDoubt {
    /// The destination could not be asked, or did not answer.
    #[error("the destination does not say what became of the guest: {0}")]
    Silent(#[from] ControlError),
    /// Its records say nothing of this attempt.
    #[error(
        "the destination's state has no record of this migration, which proves nothing: is it the host, and the folder, that the \
         guest was sent to?"
    )]
    NoWord,
    /// It waits for GO, which this question must not give.
    #[error("the destination is ready and waits for the guest")]
    Ready,
    /// The operator says that the destination is fenced, and it gave a sign of life.
    #[error("the destination is not fenced, because it answered: {0}")]
    Contradicted(String),
    /// The guest was not given away, or the operator's word was to count, and the disk does not take the record.
    #[error("the guest stays paused until it is recorded that it is the source's: {0}")]
    Unrecorded(#[source] StateError),
    /// Whatever the destination says, another process holds the guest's lock, or it cannot be reached.
    #[error("the guest does not run here without its lock: {0}")]
    Lock(#[from] LockError),
    /// An answer out of turn.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

/// Why the records of a guest cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file.
    #[error(transparent)]
    State(#[from] StateError),
    /// What it says.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

impl fmt::Display for Doubt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "what became of the guest that was given to {}", self.peer())
    }
}

/// How long a destination has for each part of an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

const WITHDRAWN: &str = "the source could not record that it gives the guest away, and keeps it";

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::control::read_preamble;

    const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);

    /// A destination that answers one question, and must not get the guest.
    fn destination(answers: Message) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_preamble(&mut stream, ANSWER_MAX).unwrap();
            let mut control = ControlChannel::answer(stream).unwrap();
            assert_eq!(control.receive("a question", Some(ANSWER_MAX)).unwrap(), Message::Ask(ATTEMPT_ID));
            control.send(&answers).unwrap();
            // Whatever else is said is no GO.
            while let Ok(message) = control.receive("the end", Some(ANSWER_MAX)) {
                assert!(!matches!(message, Message::Go(_)));
            }
        });
        address
    }

    /// The doubt of a guest that was given to a host of a name that cannot be resolved any more.
    fn doubt(address: SocketAddr) -> Doubt {
        let state = HostState::lost_with_this_process();
        let records = state.start("tern", false).unwrap().writer().unwrap();
        let (peer, address) = ("no-such-host.invalid:7837".to_owned(), Some(address));
        let (mark, side) = (RecordKind::Committed, Side::Source);
        records.append(Record { mark, side, attempt_id: ATTEMPT_ID, peer, address }).unwrap();
        drop(records);
        Doubt::recover(&state, "tern", None).unwrap().unwrap()
    }

    #[test]
    fn a_doubt_asks_at_the_address_that_answered_and_not_at_the_name() {
        let refused = destination(Message::Outcome(ATTEMPT_ID, Outcome::Refused));
        assert!(matches!(doubt(refused).ask(), Verdict::Kept));
    }

    #[test]
    fn an_operators_word_gives_nothing_away_and_is_void_where_the_destination_answers() {
        let ready = destination(Message::Outcome(ATTEMPT_ID, Outcome::Prepared));
        let contradicted = doubt(ready).fenced();
        assert!(matches!(contradicted, Verdict::Open(StillInDoubt::Contradicted(_))), "{contradicted:?}");
        let unknown = destination(Message::Outcome(ATTEMPT_ID, Outcome::Unknown));
        assert!(matches!(doubt(unknown).fenced(), Verdict::Open(StillInDoubt::Contradicted(_))));
        let running = destination(Message::Outcome(ATTEMPT_ID, Outcome::Running));
        assert!(matches!(doubt(running).fenced(), Verdict::Moved));
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(matches!(doubt(closed).fenced(), Verdict::Kept));
    }
}

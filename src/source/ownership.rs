//! Whose the guest is, as its source sees it: the handover's machine, its journal, and what is asked when nobody knows.

use std::fmt;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::control::{ControlChannel, ControlError, STEP_MAX};
use crate::handover::{
    GuestHere, HandoverError, Mark, Side, SourceAction, SourceEvent, SourceHandover, SourceState,
};
use crate::journal::{Journals, JournalsError, OpenJournal};
use crate::lock::{LOCK_MAX, Lock, LockError};
use crate::wire::{Epoch, Message, Outcome};

/// The source's half of one handover; what it wants recorded is recorded.
#[derive(Debug)]
pub(super) struct Ownership {
    handover: SourceHandover,
    journal: OpenJournal,
    /// The destination, as `HOST:PORT`.
    peer: String,
    /// What arbitrates between the hosts.
    lock: Option<Lock>,
    /// Why the last record could not be written.
    unrecorded: Option<JournalsError>,
}

/// Opens the journal of a guest that runs here. That it runs is the proof that no earlier attempt gave it away, whatever a disk that
/// fails has kept of that one.
pub(super) fn open_journal(journals: &Journals, name: &str) -> Result<OpenJournal, OpenError> {
    let mut journal = journals.open(name, Side::Source)?;
    if let Some(last) = journal.journal().last().cloned() {
        let (_, action) = SourceHandover::recover(last.epoch, last.mark, GuestHere::Running)?;
        if let SourceAction::Record(mark) = action {
            journal.append(mark, last.epoch, &last.peer)?;
        }
    }
    Ok(journal)
}

impl Ownership {
    pub(super) fn new(journal: OpenJournal, peer: String, epoch: Epoch, lock: Option<Lock>) -> Self {
        Self { handover: SourceHandover::new(epoch), journal, peer, lock, unrecorded: None }
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
    pub(super) fn begin_anew(&mut self, epoch: Epoch) -> Result<(), HandoverError> {
        if self.state() != SourceState::Running {
            return Err(HandoverError::OtherAction);
        }
        self.handover = SourceHandover::new(epoch);
        Ok(())
    }

    /// How long a record takes.
    pub(super) fn record_time(&self) -> Duration {
        self.journal.record_time()
    }

    pub(super) fn state(&self) -> SourceState {
        self.handover.state()
    }

    /// Tells the handover what happened, and records what it wants recorded; returns what is to be done then.
    pub(super) fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        let mut action = self.handover.on(event)?;
        while let SourceAction::Record(mark) = action {
            let recorded = self.record(mark);
            action = self.handover.on(recorded)?;
        }
        Ok(action)
    }

    fn record(&mut self, mark: Mark) -> SourceEvent {
        match self.journal.append(mark, self.handover.epoch(), &self.peer) {
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
    pub(super) fn take_unrecorded(&mut self) -> Option<JournalsError> {
        self.unrecorded.take()
    }

    /// RUNNING was heard: the guest is the destination's, which need not remember it for this side.
    pub(super) fn release(
        &mut self,
        epoch: Epoch,
        control: &mut ControlChannel,
    ) -> Result<(), HandoverError> {
        if self.on(SourceEvent::Running(epoch))? != SourceAction::Release {
            return Err(HandoverError::OtherAction);
        }
        if self.unrecorded.is_none() {
            // It may be gone. Then it is asked no more all the same.
            let _ = control.send(&Message::Done(epoch));
        }
        Ok(())
    }

    /// In doubt: asks the destination once.
    pub(super) fn ask(&mut self) -> Verdict {
        let verdict = match self.state() {
            SourceState::Kept => Verdict::Kept,
            SourceState::Released => Verdict::Moved,
            _ => self.converse().unwrap_or_else(Verdict::Open),
        };
        match verdict {
            Verdict::Kept => {
                self.take_lock().map_or_else(|error| Verdict::Open(error.into()), |()| Verdict::Kept)
            }
            verdict => verdict,
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

    fn converse(&mut self) -> Result<Verdict, StillInDoubt> {
        let epoch = self.handover.epoch();
        let mut control = ControlChannel::connect_within(&self.peer, ANSWER_MAX, ANSWER_MAX)?;
        control.send(&Message::Ask(epoch))?;
        let mut answer = control.receive("word of the guest", Some(ANSWER_MAX))?;
        if answer == Message::Outcome(epoch, Outcome::Prepared) {
            if self.on(SourceEvent::Prepared(epoch))? != SourceAction::SendGo {
                return Err(HandoverError::OtherAction.into());
            }
            self.give_lock_up();
            control.send(&Message::Go(epoch))?;
            answer = control.receive("RUNNING", Some(STEP_MAX))?;
        }
        match answer {
            Message::Running(of) | Message::Outcome(of, Outcome::Running) => {
                self.release(of, &mut control)?;
                Ok(Verdict::Moved)
            }
            Message::Abort(of, _) | Message::Outcome(of, Outcome::Refused) => {
                match self.on(SourceEvent::Refused(of))? {
                    SourceAction::Resume => Ok(Verdict::Kept),
                    _ => Err(HandoverError::OtherAction.into()),
                }
            }
            Message::Outcome(of, Outcome::Unknown) if of == epoch => Err(StillInDoubt::NoWord),
            other => {
                Err(ControlError::Unexpected { expected: "word of the guest", got: other.name() }.into())
            }
        }
    }

    /// After a failure that nobody can say the outcome of.
    pub(super) fn into_doubt(mut self) -> Doubt {
        if !matches!(self.state(), SourceState::InDoubt | SourceState::Kept) {
            // Something failed in the middle of a step. COMMITTED may be recorded, so it counts as that.
            let epoch = self.handover.epoch();
            if let Ok((handover, _)) = SourceHandover::recover(epoch, Mark::Committed, GuestHere::Paused) {
                self.handover = handover;
            }
        }
        Doubt(self)
    }
}

/// A guest that was given away and of which nobody has said that it arrived, or never will: it is kept paused, and the destination
/// is asked until it says. Whoever holds this keeps the guest's journal locked.
#[derive(Debug)]
pub struct Doubt(Ownership);

impl Doubt {
    /// The doubt that a journal tells of, of a guest that ended with its process or host after COMMITTED was written; none, if it
    /// tells of none. To ask is worth while all the same: a destination that still waits gets its GO. With a `lock` the guest counts
    /// as kept only once that could be taken.
    ///
    /// # Errors
    /// [`OpenError`], also if the process that held the guest is alive: that one asks.
    pub fn recover(journals: &Journals, name: &str, lock: Option<Lock>) -> Result<Option<Self>, OpenError> {
        // One without a word is left as it is: that a migration was begun is all there is to know.
        if journals.look(name, Side::Source)?.is_none_or(|journal| journal.last().is_none()) {
            return Ok(None);
        }
        let journal = journals.open(name, Side::Source)?;
        let Some(last) = journal.journal().last().cloned() else { return Ok(None) };
        let (handover, action) = SourceHandover::recover(last.epoch, last.mark, GuestHere::Gone)?;
        let doubt = Self(Ownership { handover, journal, peer: last.peer, lock, unrecorded: None });
        Ok((action == SourceAction::Ask).then_some(doubt))
    }

    /// The destination, as `HOST:PORT`.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.0.peer
    }

    /// Asks the destination once, which takes some seconds where it does not answer. A destination that still waits for the guest is
    /// told to run it.
    ///
    /// On [`Verdict::Kept`], when its lock is held again too, resume the guest, on [`Verdict::Moved`] destroy it. The verdict stays what it was once it is one of those.
    pub fn ask(&mut self) -> Verdict {
        self.0.ask()
    }

    /// The same, again and again for a while: whoever listens there may be busy for a moment.
    pub fn ask_for(&mut self, time: Duration) -> Verdict {
        self.0.ask_for(time)
    }

    /// The operator's word that the destination's host is fenced: it is off, or can reach neither disks nor network, and will not
    /// run this guest. Resume the guest then. **If the word is false, the guest runs twice.**
    ///
    /// # Errors
    /// [`StillInDoubt::Lock`] if the guest has a lock and somebody holds that, so the word cannot be true;
    /// [`StillInDoubt::Handover`] if there is no doubt any more.
    pub fn fenced(&mut self) -> Result<(), StillInDoubt> {
        self.0.take_lock()?;
        if self.0.state() == SourceState::Kept {
            return Ok(());
        }
        match self.0.on(SourceEvent::Fenced) {
            Ok(SourceAction::Resume) => Ok(()),
            other => {
                self.0.give_lock_up();
                Err(other.err().unwrap_or(HandoverError::OtherAction).into())
            }
        }
    }
}

/// What became of a guest in doubt.
#[derive(Debug)]
pub enum Verdict {
    /// It runs, or has run, at the destination: it must not run here again.
    Moved,
    /// It never ran there and never will: it is the source's.
    Kept,
    /// Nobody knows yet.
    Open(StillInDoubt),
}

/// Why a doubt is not settled.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StillInDoubt {
    /// The destination could not be asked, or did not answer.
    #[error("the destination does not say what became of the guest: {0}")]
    Silent(#[from] ControlError),
    /// Its journals have no word of this attempt.
    #[error(
        "no journal at the destination has a word of this migration, which proves nothing: is it the host, and the \
         --state-dir, that the guest was sent to?"
    )]
    NoWord,
    /// Whatever the destination says, somebody holds the guest's lock, or it cannot be reached.
    #[error("the guest does not run here without its lock: {0}")]
    Lock(#[from] LockError),
    /// An answer out of turn.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

/// Why a source's journal cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file.
    #[error(transparent)]
    Journal(#[from] JournalsError),
    /// What it says.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

impl fmt::Display for Doubt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "what became of the guest that was given to {}", self.0.peer)
    }
}

/// How long a destination has for each part of an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

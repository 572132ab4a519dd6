//! A guest in doubt, and the ways to settle the doubt.

use std::fmt;
use std::time::Duration;

use super::durable_handover::DurableHandover;
use super::verdict::{OpenError, Verdict};
use crate::handover::{RecordKind, SourceState};
use crate::lock::Lock;
use crate::state::{GuestClaim, HostState};

/// A guest that was given away without confirmation of its arrival, or whose failed handover cannot be
/// recorded as kept. The guest stays paused until the destination has answered. The holder of this value
/// keeps the guest's state claimed.
#[derive(Debug)]
pub struct Doubt(DurableHandover);

impl Doubt {
    /// After a failure with an unknown outcome.
    pub(super) fn after_failure(mut handover: DurableHandover) -> Self {
        if !matches!(handover.state(), SourceState::InDoubt | SourceState::Withdrawn | SourceState::Kept) {
            handover.presume_committed();
        }
        Self(handover)
    }

    /// The doubt in a host's records about a guest that ended with its process or host after COMMITTED was
    /// written; `None` if the records show none. Asking is useful even so: a destination that still waits
    /// gets its GO. With a `lock` the guest counts as kept only once the lock could be taken.
    ///
    /// # Errors
    /// [`OpenError`], also if the process that has the guest is alive: that process asks.
    pub fn recover(state: &HostState, name: &str, lock: Option<Lock>) -> Result<Option<Self>, OpenError> {
        let seen = state.look(name)?.and_then(|sighting| sighting.journal.last().cloned());
        if seen.is_none_or(|last| last.mark != RecordKind::Committed) {
            return Ok(None);
        }
        Self::of(&state.claim(name)?, lock)
    }

    /// The same for a guest that stands still since it was given away, with its name claimed by this process.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn of(claim: &GuestClaim, lock: Option<Lock>) -> Result<Option<Self>, OpenError> {
        let records = claim.writer()?;
        let Some(last) = records.last().filter(|last| last.mark == RecordKind::Committed) else {
            return Ok(None);
        };
        Ok(Some(Self(DurableHandover::recover(last, records, lock)?)))
    }

    /// The destination, as `HOST:PORT`.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.0.peer()
    }

    /// Asks the destination once, which takes some seconds if it does not answer. A destination that still
    /// waits for the guest receives GO.
    ///
    /// On [`Verdict::Kept`], which includes holding the lock again, resume the guest; on [`Verdict::Moved`]
    /// destroy it. These two verdicts are final.
    pub fn ask(&mut self) -> Verdict {
        self.0.ask()
    }

    /// The same, repeated for this time: the destination may be busy for a moment.
    pub fn ask_for(&mut self, time: Duration) -> Verdict {
        self.0.ask_for(time)
    }

    /// The operator's word that the destination's host is fenced: it is off, or can reach neither disks nor
    /// network, and will not run this guest. The source first asks the destination, without sending GO; an
    /// answer counts, and any sign of life voids the word. **If the word is false and the destination silent,
    /// the guest runs twice.**
    ///
    /// [`Verdict::Kept`]: resume the guest. [`Verdict::Open`] with [`StillInDoubt::Contradicted`]: the word
    /// was false. With [`StillInDoubt::Lock`]: another process holds the guest's lock, so the word cannot be
    /// true. With [`StillInDoubt::Unrecorded`]: the word could not be recorded, and so does not count.
    ///
    /// [`StillInDoubt::Contradicted`]: super::StillInDoubt::Contradicted
    /// [`StillInDoubt::Lock`]: super::StillInDoubt::Lock
    /// [`StillInDoubt::Unrecorded`]: super::StillInDoubt::Unrecorded
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

impl fmt::Display for Doubt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "what became of the guest that was given to {}", self.peer())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};
    use std::thread;

    use super::super::verdict::StillInDoubt;
    use super::*;
    use crate::control::{ControlChannel, read_preamble};
    use crate::handover::{Record, Side};
    use crate::wire::{AttemptId, Message, Outcome};

    const ANSWER_MAX: Duration = Duration::from_secs(5);
    const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);

    /// A destination that answers one question, and must not receive GO.
    fn destination(answers: Message) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_preamble(&mut stream, ANSWER_MAX).unwrap();
            let mut control = ControlChannel::answer(stream).unwrap();
            assert_eq!(control.receive("a question", Some(ANSWER_MAX)).unwrap(), Message::Ask(ATTEMPT_ID));
            control.send(&answers).unwrap();
            // No other message may be GO.
            while let Ok(message) = control.receive("the end", Some(ANSWER_MAX)) {
                assert!(!matches!(message, Message::Go(_)));
            }
        });
        address
    }

    /// The doubt about a guest that was given to a host with a name that no longer resolves.
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

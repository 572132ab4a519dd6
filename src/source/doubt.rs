//! A guest in doubt, and the ways to settle the doubt.

use std::fmt;
use std::time::Duration;

use super::durable_handover::DurableHandover;
use super::verdict::{OpenError, Verdict};
use crate::control::Security;
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
    /// gets its GO. With a `lock` the guest counts as kept only once the lock could be taken. An attempt that
    /// began with TLS is settled only by the host that has proved the same key.
    ///
    /// # Errors
    /// [`OpenError`], also if the process that has the guest is alive: that process asks.
    pub fn recover(
        state: &HostState,
        name: &str,
        (security, lock): (Security, Option<Lock>),
    ) -> Result<Option<Self>, OpenError> {
        let seen = state.look(name)?.and_then(|sighting| sighting.journal.last().cloned());
        if seen.is_none_or(|last| last.mark != RecordKind::Committed) {
            return Ok(None);
        }
        Self::of(&state.claim(name)?, (security, lock))
    }

    /// The same for a guest that stands still since it was given away, with its name claimed by this process.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn of(
        claim: &GuestClaim,
        (security, lock): (Security, Option<Lock>),
    ) -> Result<Option<Self>, OpenError> {
        let records = claim.writer()?;
        let Some(last) = records.last().filter(|last| last.mark == RecordKind::Committed) else {
            return Ok(None);
        };
        Ok(Some(Self(DurableHandover::recover(last, records, (security, lock))?)))
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

    use sterna_trust::{Peer, Rights, TrustStore};

    use super::super::verdict::StillInDoubt;
    use super::*;
    use crate::control::{ControlChannel, ControlError, answered, greet, read_preamble};
    use crate::handover::{Record, Side};
    use crate::wire::{AttemptId, Message, Outcome};

    const ANSWER_MAX: Duration = Duration::from_secs(5);
    const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);

    /// A destination that answers one question, and must not receive GO.
    fn destination(answers: Message) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut control = answered(listener.accept().unwrap().0, ANSWER_MAX);
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
        records.append(Record { mark, side, attempt_id: ATTEMPT_ID, peer, address, identity: None }).unwrap();
        drop(records);
        Doubt::recover(&state, "tern", (Security::default(), None)).unwrap().unwrap()
    }

    #[test]
    fn a_doubt_asks_at_the_address_that_answered_and_not_at_the_name() {
        let refused = destination(Message::Outcome(ATTEMPT_ID, Outcome::Refused));
        assert!(matches!(doubt(refused).ask(), Verdict::Kept));
    }

    /// Hosts that all trust each other; the first is the source.
    fn hosts() -> (tempfile::TempDir, [TrustStore; 3]) {
        let folder = tempfile::tempdir().unwrap();
        let stores = ["a", "b", "c"].map(|name| TrustStore::at(&folder.path().join(name)));
        for (number, store) in stores.iter().enumerate() {
            let fingerprint = store.host_key().unwrap().fingerprint();
            for other in &stores {
                let peer = Peer { name: format!("host-{number}"), fingerprint, rights: Rights::all() };
                other.add(peer).unwrap();
            }
        }
        (folder, stores)
    }

    /// Greets with this key, if any, and answers that the guest never ran.
    fn answers_as(store: Option<&TrustStore>) -> SocketAddr {
        let security = store.map_or(Security::default(), |store| Security::trusting(store.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let opened = read_preamble(&mut stream, ANSWER_MAX).unwrap();
            let Ok(greeted) = greet(stream, opened, &security, ANSWER_MAX) else { return };
            let mut control = ControlChannel::over(greeted).unwrap();
            let _ = control.send(&Message::Outcome(ATTEMPT_ID, Outcome::Refused));
            while control.receive("anything", Some(ANSWER_MAX)).is_ok() {}
        });
        address
    }

    #[test]
    fn only_the_host_that_the_guest_was_given_to_says_what_became_of_it() {
        let (_folder, [source, destination, other]) = hosts();
        let identity = Some(destination.host_key().unwrap().fingerprint());
        let ask = |address, security: Security| {
            let state = HostState::lost_with_this_process();
            let records = state.start("tern", false).unwrap().writer().unwrap();
            let (peer, address) = ("host-b:7837".to_owned(), Some(address));
            let (mark, side, attempt_id) = (RecordKind::Committed, Side::Source, ATTEMPT_ID);
            records.append(Record { mark, side, attempt_id, peer, address, identity }).unwrap();
            drop(records);
            Doubt::recover(&state, "tern", (security, None)).unwrap().unwrap().ask()
        };
        let by = |verdict| match verdict {
            Verdict::Open(StillInDoubt::Silent(error)) => error,
            settled => panic!("{settled:?}"),
        };
        let trusting = || Security::trusting(source.clone());
        assert!(matches!(by(ask(answers_as(Some(&other)), trusting())), ControlError::OtherHost(_)));
        assert!(matches!(by(ask(answers_as(None), trusting())), ControlError::TlsMissing));
        // Without keys the source does not ask at all, whatever is allowed for other attempts.
        for without in [Security::default(), Security::insecure()] {
            assert!(matches!(by(ask(answers_as(None), without)), ControlError::KeysNeeded));
        }
        assert!(matches!(ask(answers_as(Some(&destination)), trusting()), Verdict::Kept));
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

//! Whoever else comes while a guest arrives, or is held: each gets an answer, and a source in doubt is let in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::Receiver;
use crate::control::ControlChannel;
use crate::lock::{Lock, LockError};
use crate::wire::{Epoch, Message, Refusal};

/// A source that comes anew for its own guest: with a question, or with GO.
pub(super) struct Visit {
    pub(super) control: ControlChannel,
    pub(super) message: Message,
}

/// Has somebody at the door for as long as `work` takes, which hears of the visits that are about `epoch`.
pub(super) fn with_door<T>(
    receiver: &Receiver,
    epoch: Epoch,
    work: impl FnOnce(&mpsc::Receiver<Visit>) -> T,
) -> T {
    let closed = AtomicBool::new(false);
    // One at a time: a source has no reason to come twice at once.
    let (visits, coming) = sync_channel(1);
    thread::scope(|scope| {
        let _close = CloseOnDrop(&closed);
        scope.spawn(|| keep(receiver, epoch, visits, &closed));
        work(&coming)
    })
}

/// Also if the work panics: the scope waits for the thread.
struct CloseOnDrop<'door>(&'door AtomicBool);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the channel ends with the door")]
fn keep(receiver: &Receiver, epoch: Epoch, visits: SyncSender<Visit>, closed: &AtomicBool) {
    while !closed.load(Ordering::Relaxed) {
        let mut control = match receiver.accept_within(Some(TICK), DOOR_MAX) {
            Ok(Some(control)) => control,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!("{error}");
                thread::sleep(TICK);
                continue;
            }
        };
        match control.receive("a question", Some(DOOR_MAX)) {
            Ok(message @ (Message::Ask(of) | Message::Go(of))) if of == epoch => {
                let _ = visits.try_send(Visit { control, message });
            }
            Ok(message) => receiver.answer_stranger(&mut control, &message),
            Err(error) => tracing::warn!("{} was turned away: {error}", control.peer_address()),
        }
    }
}

impl Receiver {
    /// Answers sources that ask what became of their guests, until the one of this attempt has heard it and needs to ask no more.
    /// For a guest that [runs here](super::Arrival) and whose source may not know. Nobody else may send a guest meanwhile.
    pub fn answer_until_done(&self, epoch: Epoch) {
        loop {
            let mut control = match self.accept_within(None, super::HELLO_MAX) {
                Ok(Some(control)) => control,
                Ok(None) => continue,
                Err(error) => {
                    tracing::warn!("sources that ask get no answer any more: {error}");
                    return;
                }
            };
            match control.receive("a question", Some(super::HELLO_MAX)) {
                Ok(Message::Ask(of)) => {
                    if self.answer(&mut control, of) && of == epoch {
                        return;
                    }
                }
                Ok(message) => self.answer_stranger(&mut control, &message),
                Err(error) => tracing::warn!("{} was turned away: {error}", control.peer_address()),
            }
        }
    }

    /// Who asks about another attempt is told what the journals say of it, and who wants to come that this is no time.
    fn answer_stranger(&self, control: &mut ControlChannel, message: &Message) {
        match message {
            Message::Ask(epoch) => {
                self.answer(control, *epoch);
            }
            Message::Hello(_) | Message::OfferImage(_) => {
                let _ = control.send(&Message::Refused(Refusal::Busy));
            }
            other => tracing::warn!("{} began with {}", control.peer_address(), other.name()),
        }
    }
}

/// A guest that is ready and was left by its source: it is held for a while, for the source or the operator to say what is to become
/// of it. A handle for the operator's side of that.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<Option<Holding>>>);

#[derive(Debug)]
struct Holding {
    until: Instant,
    fenced: bool,
    lock: Option<Lock>,
}

impl Held {
    /// How long the guest will be held from now on; `None` if none is.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.lock().as_ref().map(|holding| holding.until.saturating_duration_since(Instant::now()))
    }

    /// The operator's word that the source's host is fenced: it is off, or can reach neither disks nor network, and will not run
    /// this guest. It is run here then. **If the word is false, the guest runs twice.** False if no guest is held.
    ///
    /// # Errors
    /// [`LockError`] if the guest has a lock and somebody holds that, so the word cannot be true. Nothing changes.
    pub fn source_is_fenced(&self) -> Result<bool, LockError> {
        let mut holding = self.lock();
        let Some(holding) = holding.as_mut() else { return Ok(false) };
        // Before the end of the holding, which waits for this: so whoever runs the guest then has it, or gives it up.
        holding.lock.as_ref().map_or(Ok(()), Lock::take)?;
        holding.fenced = true;
        Ok(true)
    }

    pub(super) fn begin(&self, until: Instant, lock: Option<Lock>) {
        *self.lock() = Some(Holding { until, fenced: false, lock });
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.lock().as_ref().is_some_and(|holding| holding.fenced)
    }

    /// Ends it; whether the operator had given their word.
    pub(super) fn end(&self) -> bool {
        self.lock().take().is_some_and(|holding| holding.fenced)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Holding>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often it is looked whether the work is done.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// How long whoever comes may take to say each thing. Short: the end of the work waits for it.
const DOOR_MAX: Duration = Duration::from_secs(2);

//! Whoever else comes while a guest arrives, or is held: each gets an answer, and a source in doubt is let in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::control::ControlChannel;
use crate::panics::Panicked;
use crate::session::{Listener, TICK};
use crate::wire::{AttemptId, Message};

/// A source that comes anew for its own guest: with a question, or with GO.
pub(super) struct Reconnect {
    pub(super) control: ControlChannel,
    pub(super) message: Message,
}

/// Has somebody at the acceptor for as long as `work` takes, which hears of the reconnects that are about `attempt_id`.
pub(super) fn with_acceptor<T>(
    listener: &Listener,
    attempt_id: AttemptId,
    work: impl FnOnce(&mpsc::Receiver<Reconnect>) -> T,
) -> T {
    let closed = AtomicBool::new(false);
    // One at a time: a source has no reason to come twice at once.
    let (reconnects, coming) = sync_channel(1);
    thread::scope(|scope| {
        let keeper = scope.spawn(|| keep(listener, attempt_id, reconnects, &closed));
        let done = {
            let _close = CloseOnDrop(&closed);
            work(&coming)
        };
        // Joined here, or the scope would panic with it, and the guest that may run by now would be lost.
        if let Err(panic) = keeper.join() {
            let Panicked(text) = panic.into();
            tracing::error!("sources that came meanwhile got no answer: a defect of sterna: {text}");
        }
        done
    })
}

/// Also if the work panics: the scope waits for the thread.
struct CloseOnDrop<'acceptor>(&'acceptor AtomicBool);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the channel ends with the door")]
fn keep(listener: &Listener, attempt_id: AttemptId, reconnects: SyncSender<Reconnect>, closed: &AtomicBool) {
    while !closed.load(Ordering::Relaxed) {
        let mut control = match listener.accept_within(Some(TICK), DOOR_MAX) {
            Ok(Some(control)) => control,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!("{error}");
                thread::sleep(TICK);
                continue;
            }
        };
        match control.receive("a question", Some(DOOR_MAX)) {
            Ok(message @ (Message::Ask(of) | Message::Go(of))) if of == attempt_id => {
                let _ = reconnects.try_send(Reconnect { control, message });
            }
            Ok(message) => listener.answer_stranger(&mut control, &message),
            Err(error) => tracing::warn!("{} was turned away: {error}", control.peer_address()),
        }
    }
}

/// How long whoever comes may take to say each thing. Short: the end of the work waits for it.
const DOOR_MAX: Duration = Duration::from_secs(2);

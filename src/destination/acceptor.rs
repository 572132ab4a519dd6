//! A thread that accepts connections while a guest arrives or is held: the attempt's own source may come again, and other sources get
//! an answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, sync_channel};
use std::thread;

use crate::panics::Panicked;
use crate::session::{AttemptRoute, Listener, Reconnect, TICK};
use crate::wire::AttemptId;

/// Accepts connections for as long as `work` takes, which gets those of the source of this attempt.
pub(super) fn with_acceptor<T>(
    listener: &Listener,
    attempt_id: AttemptId,
    work: impl FnOnce(&mpsc::Receiver<Reconnect>) -> T,
) -> T {
    let closed = AtomicBool::new(false);
    // One at a time: a source has no reason to come twice at once.
    let (reconnects, coming) = sync_channel(1);
    let attempt = listener.attempt(attempt_id);
    thread::scope(|scope| {
        let keeper = scope.spawn(|| keep(attempt, reconnects, &closed));
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

#[expect(clippy::needless_pass_by_value, reason = "the channel ends with the thread")]
fn keep(attempt: AttemptRoute<'_>, reconnects: SyncSender<Reconnect>, closed: &AtomicBool) {
    while !closed.load(Ordering::Relaxed) {
        match attempt.reconnect_within(TICK) {
            Ok(Some(reconnect)) => {
                let _ = reconnects.try_send(reconnect);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("the listening socket failed: {error}");
                thread::sleep(TICK);
            }
        }
    }
}

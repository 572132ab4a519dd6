//! A thread that accepts connections while a guest arrives or is held: the attempt's own source may
//! reconnect, and other sources get an answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, sync_channel};
use std::thread;

use sterna_trust::Fingerprint;

use crate::panics::Panicked;
use crate::session::{AttemptRoute, Listener, Reconnect, TICK};
use crate::wire::AttemptId;

/// Accepts connections for as long as `work` runs; `work` receives those of this attempt's source.
pub(super) fn with_acceptor<T>(
    listener: &Listener,
    (attempt_id, owner): (AttemptId, Option<Fingerprint>),
    work: impl FnOnce(&mpsc::Receiver<Reconnect>) -> T,
) -> T {
    let closed = AtomicBool::new(false);
    // One at a time: a source has no reason for two connections at once.
    let (reconnects, coming) = sync_channel(1);
    let attempt = listener.attempt(attempt_id, owner);
    thread::scope(|scope| {
        let keeper = scope.spawn(|| keep(attempt, reconnects, &closed));
        let done = {
            let _close = CloseOnDrop(&closed);
            work(&coming)
        };
        // Joined in this place: a panic would otherwise end the scope, and with it a guest that may already
        // run.
        if let Err(panic) = keeper.join() {
            let Panicked(text) = panic.into();
            tracing::error!("sources that came meanwhile got no answer: a defect of sterna: {text}");
        }
        done
    })
}

/// Ends the thread, also if the work panics: the scope waits for the thread.
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

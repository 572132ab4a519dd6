//! A request to end a migration or a transfer.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::error::SessionError;
use crate::control::PeerLiveness;
use crate::poison::IgnorePoison;

/// A request to end a migration, kept by any part of the program that may make it. Until the guest is given
/// away it takes effect at once, also in a wait for the destination, which is informed.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Request>);

#[derive(Debug, Default)]
struct Request {
    state: AtomicU8,
    /// The other side: a request ends every wait for it.
    peer: Mutex<Option<PeerLiveness>>,
}

impl Cancel {
    const OPEN: u8 = 0;
    const CANCELLED: u8 = 1;
    const TOO_LATE: u8 = 2;

    /// Requests the end. False if it is too late: the guest is being given away, and the destination may run
    /// it already.
    pub fn cancel(&self) -> bool {
        self.turn(Self::OPEN, Self::CANCELLED);
        let cancelled = self.check().is_err();
        if let Some(peer) = self.peer().as_ref().filter(|_| cancelled) {
            peer.interrupt();
        }
        cancelled
    }

    pub(crate) fn check(&self) -> Result<(), SessionError> {
        if self.0.state.load(Ordering::Relaxed) == Self::CANCELLED {
            Err(SessionError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// The cause of a failure, which may be this request.
    pub(crate) fn explain(&self, cause: SessionError) -> SessionError {
        match cause {
            SessionError::Control(_) | SessionError::Transport(_) => self.check().err().unwrap_or(cause),
            cause => cause,
        }
    }

    /// From now on a request ends every wait for this peer.
    pub(crate) fn ends_waits_for(&self, peer: PeerLiveness) -> Result<(), SessionError> {
        // Under the lock, so that a concurrent request either finds the peer or is found by this check.
        let mut held = self.peer();
        self.check()?;
        *held = Some(peer);
        Ok(())
    }

    /// From now on a request is too late; fails if one was made before.
    pub(crate) fn close(&self) -> Result<(), SessionError> {
        self.turn(Self::OPEN, Self::TOO_LATE);
        self.check()
    }

    /// The guest was not given away after all, or another is to come.
    pub(crate) fn reopen(&self) {
        self.turn(Self::TOO_LATE, Self::OPEN);
    }

    fn turn(&self, from: u8, to: u8) {
        // The requester looks at the outcome.
        let _ = self.0.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn peer(&self) -> MutexGuard<'_, Option<PeerLiveness>> {
        self.0.peer.lock().ignore_poison()
    }
}

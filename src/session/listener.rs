//! The socket at which sources connect, shared by all attempts.
//!
//! The accept loop has no thread of its own: any thread that waits for a connection accepts for all attempts.
//! The connections are greeted elsewhere ([`Greeter`]), and kept for the attempts that wait for them.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use sterna_trust::Fingerprint;

use super::cancel::Cancel;
use super::error::SessionError;
use super::greeter::Greeter;
use super::greeting::first_of_source;
use super::opening::{HELLO_MAX, Opening};
use super::outcome::answer;
use super::routes::{Owned, Reconnect, Routes};
use crate::control::{ControlChannel, Security};
use crate::poison::IgnorePoison;
use crate::state::HostState;
use crate::transport::{LaneConnection, LaneConnections};
use crate::wire::{AttemptId, Message, Token};

/// A listening socket, and the records that answer sources in doubt.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    greeter: Arc<Greeter>,
}

impl Listener {
    pub(crate) fn new(socket: TcpListener, state: HostState) -> Self {
        if let Err(error) = socket.set_nonblocking(false) {
            tracing::warn!("the listening socket stays in its mode: {error}");
        }
        Self { socket, greeter: Arc::new(Greeter::new(state)) }
    }

    /// From now on connections are protected in this way.
    pub(crate) fn protect_by(&self, security: Security) {
        self.greeter.protect_by(security);
    }

    pub(crate) fn state(&self) -> &HostState {
        &self.greeter.state
    }

    pub(crate) fn local_address(&self) -> Result<SocketAddr, SessionError> {
        self.socket.local_addr().map_err(SessionError::Accept)
    }

    /// Waits for a source that brings this kind of opening. Sources with the other kind are refused.
    pub(crate) fn await_opening<O: Opening>(
        &self,
        cancel: &Cancel,
    ) -> Result<(ControlChannel, O), SessionError> {
        let _wanted = Wanted::new(self);
        loop {
            cancel.check()?;
            let next = self.wait(TICK, |routes| routes.openings.pop_front()).map_err(SessionError::Accept)?;
            let Some((mut control, message)) = next else { continue };
            match O::of(message) {
                Ok(opening) => return Ok((control, opening)),
                Err(other) => {
                    let from = control.peer_address();
                    tracing::warn!("{from} began with {} and was turned away", other.name());
                    let _ = control.send(&Message::Refused(O::OTHERS));
                }
            }
        }
    }

    /// The opening on a connection that was accepted elsewhere.
    pub(crate) fn opening_on<O: Opening>(
        &self,
        stream: TcpStream,
    ) -> Result<(ControlChannel, O), SessionError> {
        let (control, message) = first_of_source(stream, &self.greeter.security(), HELLO_MAX)?;
        match O::of(message) {
            Ok(opening) => Ok((control, opening)),
            Err(other) => {
                self.greeter.answer_stranger(control, &other);
                Err(SessionError::OutOfTurn(other.name()))
            }
        }
    }

    /// Keeps reconnects of this attempt's source for it: of the host with that key, if the attempt began with
    /// TLS.
    pub(crate) fn attempt(&self, attempt_id: AttemptId, owner: Option<Fingerprint>) -> AttemptRoute<'_> {
        self.greeter.lock().routes.attempts.insert(attempt_id, Owned::by(owner));
        AttemptRoute { listener: self, attempt_id }
    }

    /// Keeps lane connections with this token for one attempt, of the same host. Without a token the attempt
    /// has none.
    pub(crate) fn lanes(&self, token: Option<Token>, owner: Option<Fingerprint>) -> LaneRoute<'_> {
        if let Some(token) = token {
            self.greeter.lock().routes.lanes.entry(token).or_insert_with(|| Owned::by(owner));
        }
        LaneRoute { listener: self, token }
    }

    /// Answers sources that ask, until the source of this attempt has received the fate of its guest.
    pub(crate) fn answer_until_done(&self, attempt_id: AttemptId, owner: Option<Fingerprint>) {
        let asking = self.attempt(attempt_id, owner);
        loop {
            match asking.reconnect_within(TICK) {
                Ok(Some(mut reconnect)) => {
                    let known = (self.state(), &self.greeter.security());
                    if answer(known, &mut reconnect.control, attempt_id) {
                        return;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(
                        "the listening socket failed, and sources that ask get no answer any more: {error}"
                    );
                    return;
                }
            }
        }
    }

    /// Waits until `take` finds a result. Meanwhile this thread or another waiting one accepts connections.
    fn wait<T>(
        &self,
        limit: Duration,
        mut take: impl FnMut(&mut Routes) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut shared = self.greeter.lock();
        loop {
            if let Some(taken) = take(&mut shared.routes) {
                return Ok(Some(taken));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if shared.is_accepting {
                shared = self.greeter.changed.wait_timeout(shared, left).ignore_poison().0;
                continue;
            }
            // No other thread ends accept(2), so while a greeting may bring what is awaited, it is short.
            let limit = if shared.is_greeting() { left.min(GREETED_WITHIN) } else { left };
            shared.is_accepting = true;
            drop(shared);
            let turn = Turn(self);
            self.accept_within(limit)?;
            drop(turn);
            shared = self.greeter.lock();
        }
    }

    /// Accepts a connection, if one comes in time, and has it greeted.
    fn accept_within(&self, limit: Duration) -> io::Result<()> {
        // accept(2) obeys the receive timeout, and 0 would be endless.
        SockRef::from(&self.socket).set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        match self.socket.accept() {
            Ok((stream, from)) => self.greeter.greet(stream, from),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) if is_lasting(&error) => return Err(error),
            Err(error) => {
                let here = self.socket.local_addr()?;
                self.greeter
                    .turned_away
                    .log(here, &format_args!("it cannot accept a connection now: {error}"));
                thread::sleep(limit.min(RECOVERS_WITHIN));
            }
        }
        Ok(())
    }
}

/// Whether a socket that failed to accept a connection will never accept one. Other errors pass: descriptors
/// or memory are short, or they belong to the connection, which Linux reports in this place (accept(2)).
fn is_lasting(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EFAULT))
}

/// Lets another thread accept after this one, even if this one fails.
struct Turn<'listener>(&'listener Listener);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.greeter.lock().is_accepting = false;
        self.0.greeter.changed.notify_all();
    }
}

/// A thread that waits for an opening.
struct Wanted<'listener>(&'listener Listener);

impl<'listener> Wanted<'listener> {
    fn new(listener: &'listener Listener) -> Self {
        listener.greeter.lock().routes.openings_wanted += 1;
        Self(listener)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        let mut shared = self.0.greeter.lock();
        let routes = &mut shared.routes;
        routes.openings_wanted -= 1;
        // The openings that no thread waits for now.
        let late = routes.openings.split_off(routes.openings.len().min(routes.openings_wanted));
        drop(shared);
        for (control, message) in late {
            self.0.greeter.answer_stranger(control, &message);
        }
    }
}

/// The reconnecting sources of an attempt.
#[derive(Debug)]
pub(crate) struct AttemptRoute<'listener> {
    listener: &'listener Listener,
    attempt_id: AttemptId,
}

impl AttemptRoute<'_> {
    /// The next reconnect, if one comes in time.
    pub(crate) fn reconnect_within(&self, limit: Duration) -> io::Result<Option<Reconnect>> {
        self.listener.wait(limit, |routes| routes.attempts.get_mut(&self.attempt_id)?.kept.take())
    }
}

impl Drop for AttemptRoute<'_> {
    fn drop(&mut self) {
        self.listener.greeter.lock().routes.attempts.remove(&self.attempt_id);
    }
}

/// The connections of an attempt's lanes.
#[derive(Debug)]
pub(crate) struct LaneRoute<'listener> {
    listener: &'listener Listener,
    token: Option<Token>,
}

impl LaneConnections for LaneRoute<'_> {
    fn connection_within(&self, limit: Duration) -> io::Result<Option<LaneConnection>> {
        self.listener.wait(limit, |routes| routes.lanes.get_mut(&self.token?)?.kept.pop_front())
    }
}

impl Drop for LaneRoute<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.token {
            self.listener.greeter.lock().routes.lanes.remove(&token);
        }
    }
}

/// The interval between two checks whether a wait is over.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// The most that a thread adds to the time of a greeting that it waits for.
const GREETED_WITHIN: Duration = Duration::from_millis(1);

/// How long a socket is left alone that cannot accept for now.
const RECOVERS_WITHIN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_does_not_close_the_socket() {
        for passes in
            [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::ECONNABORTED, libc::EPROTO]
        {
            assert!(!is_lasting(&io::Error::from_raw_os_error(passes)), "{passes}");
        }
        assert!(is_lasting(&io::Error::from_raw_os_error(libc::EBADF)));
    }
}

//! The receiver of guests.

use std::net::{SocketAddr, TcpListener, TcpStream};

use sterna_trust::Fingerprint;

use super::error::ReceiveError;
use super::incoming::{Arrival, Incoming};
use super::options::Options;
use crate::control::Security;
use crate::guest::GuestHost;
use crate::progress::Observer;
use crate::session::{Cancel, Listener};
use crate::state::HostState;
use crate::wire::AttemptId;

/// A socket at which guests may arrive.
#[derive(Debug)]
pub struct Receiver {
    listener: Listener,
}

impl Receiver {
    /// Listens at an address; port 0 picks a free one. `state` records the fate of the guests. Sources on
    /// other hosts are refused: unless it is [protected](Self::protected_by).
    ///
    /// # Errors
    /// [`ReceiveError::Listen`] if the address does not belong to this host, or is in use.
    pub fn bind(address: SocketAddr, state: HostState) -> Result<Self, ReceiveError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })?;
        Ok(Self::from_listener(listener, state))
    }

    /// Receives at a socket that the caller has made, such as one of a service manager. It must be in
    /// blocking mode.
    #[must_use]
    pub fn from_listener(listener: TcpListener, state: HostState) -> Self {
        Self { listener: Listener::new(listener, state) }
    }

    /// The same receiver, at which sources on other hosts may arrive, too.
    #[must_use]
    pub fn protected_by(self, security: Security) -> Self {
        self.listener.protect_by(security);
        self
    }

    /// The address at which it listens.
    ///
    /// # Errors
    /// [`ReceiveError::Accept`] if the system does not know.
    pub fn local_address(&self) -> Result<SocketAddr, ReceiveError> {
        Ok(self.listener.local_address()?)
    }

    /// Waits for a guest, receives it, and returns once it runs on this host.
    ///
    /// Strangers, peers of another version and sources that leave before they have described a guest are
    /// turned away without ending the wait. Sources that ask about an earlier guest get an answer.
    ///
    /// # Errors
    /// [`ReceiveError`] if a guest was refused, or a migration began and failed. The guest does not run on
    /// this host then, and its memory is freed. The receiver may be used again.
    pub fn receive<H: GuestHost>(
        &self,
        host: &H,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Arrival<H::Guest>, ReceiveError> {
        self.accept(&options.cancel)?.receive(host, options, observer)
    }

    /// Waits for a guest that a source offers. [`Incoming::receive`] receives it, on any thread of the
    /// caller's.
    ///
    /// # Errors
    /// [`ReceiveError::Cancelled`], or [`ReceiveError::Accept`] if the socket failed.
    pub fn accept(&self, cancel: &Cancel) -> Result<Incoming<'_>, ReceiveError> {
        cancel.reopen();
        let (control, hello) = self.listener.await_opening(cancel)?;
        Ok(Incoming::new(&self.listener, control, hello))
    }

    /// Receives a guest over a connection that the caller has accepted and not read from. Lanes over TCP, and
    /// a source in doubt, still connect to the socket of this receiver.
    ///
    /// # Errors
    /// As [`receive`](Self::receive); also if the connection brings no guest.
    pub fn receive_on<H: GuestHost>(
        &self,
        stream: TcpStream,
        host: &H,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Arrival<H::Guest>, ReceiveError> {
        let (control, hello) = self.listener.opening_on(stream)?;
        Incoming::new(&self.listener, control, hello).receive(host, options, observer)
    }

    /// Answers sources that ask about their guests, until the source of this attempt, which is `owner`,
    /// has its answer and needs to ask no more. For a guest that [runs on this host](Arrival) without its
    /// source knowing that.
    pub fn answer_until_done(&self, attempt_id: AttemptId, owner: Option<Fingerprint>) {
        self.listener.answer_until_done(attempt_id, owner);
    }
}

//! Where guests arrive.

use std::net::{SocketAddr, TcpListener, TcpStream};

use super::error::ReceiveError;
use super::incoming::{Arrival, Incoming};
use super::options::Options;
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
    /// Listens at an address; port 0 picks a free one. What becomes of the guests is recorded in `state`.
    ///
    /// # Errors
    /// [`ReceiveError::Listen`] if the address is not this host's, or is in use.
    pub fn bind(address: SocketAddr, state: HostState) -> Result<Self, ReceiveError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })?;
        Ok(Self::from_listener(listener, state))
    }

    /// Receives at a socket that the caller has made, as a service manager may. It must be in blocking mode.
    #[must_use]
    pub fn from_listener(listener: TcpListener, state: HostState) -> Self {
        Self { listener: Listener::new(listener, state) }
    }

    /// The address at which it listens.
    ///
    /// # Errors
    /// [`ReceiveError::Accept`] if the system does not know.
    pub fn local_address(&self) -> Result<SocketAddr, ReceiveError> {
        Ok(self.listener.local_address()?)
    }

    /// Waits for a guest, takes it in, and returns once it runs here.
    ///
    /// Strangers, peers of another version and sources that leave before they have said what they bring are turned away
    /// without ending the wait. Sources that ask what became of an earlier guest get an answer.
    ///
    /// # Errors
    /// [`ReceiveError`] if a guest was refused, or a migration began and failed. The guest does not run here then;
    /// what had arrived is freed. The receiver may be used again.
    pub fn receive<H: GuestHost>(
        &self,
        host: &H,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Arrival<H::Guest>, ReceiveError> {
        self.accept(&options.cancel)?.receive(host, options, observer)
    }

    /// Waits for a guest that wants to come. [`Incoming::receive`] takes it in, on whatever thread the caller likes.
    ///
    /// # Errors
    /// [`ReceiveError::Cancelled`], or [`ReceiveError::Accept`] if the socket failed.
    pub fn accept(&self, cancel: &Cancel) -> Result<Incoming<'_>, ReceiveError> {
        let (control, hello) = self.listener.await_opening(cancel)?;
        Ok(Incoming::new(&self.listener, control, hello))
    }

    /// Takes in a guest over a connection that the caller has accepted, of which nothing was read yet. Lanes over TCP, and a source
    /// in doubt, still come to the socket of this receiver.
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

    /// Answers sources that ask what became of their guests, until the one of this attempt has heard it and needs to ask no more.
    /// For a guest that [runs here](Arrival) and whose source may not know.
    pub fn answer_until_done(&self, attempt_id: AttemptId) {
        self.listener.answer_until_done(attempt_id);
    }
}

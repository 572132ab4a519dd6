//! The destination's side of a migration: the same five steps as at the [source](crate::source).
//!
//! Under RDMA this side does nothing in steps 2 and 3: pages appear in guest RAM. In step 4 the order is what keeps a late
//! write away from a running guest: **revoke, then compare, then load, then PREPARED**.

mod attempt;
mod error;

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

pub use error::ReceiveError;

use self::attempt::Attempt;
use crate::control::{ControlChannel, ControlError, greet, read_preamble};
use crate::digest::Digest;
use crate::guest::{Guest, GuestHost, Proposal};
use crate::transport::{Landing, land};
use crate::wire::{Final, Hello, Message, Refusal, Role};

/// A socket at which guests may arrive.
#[derive(Debug)]
pub struct Receiver {
    pub(crate) listener: TcpListener,
    pub(crate) pin_max_bytes: Option<u64>,
}

impl Receiver {
    /// Listens at an address; port 0 picks a free one.
    ///
    /// # Errors
    /// [`ReceiveError::Listen`] if the address is not this host's, or is in use.
    pub fn bind(address: SocketAddr) -> Result<Self, ReceiveError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })?;
        Ok(Self { listener, pin_max_bytes: None })
    }

    /// The same, with at most so much RAM registered for RDMA, and so pinned, at once; `None`: as much as `RLIMIT_MEMLOCK`
    /// allows. A guest with more has its slices registered in turn.
    #[must_use]
    pub fn with_pin_limit(self, pin_max_bytes: Option<u64>) -> Self {
        Self { pin_max_bytes, ..self }
    }

    /// The address at which it listens.
    ///
    /// # Errors
    /// [`ReceiveError::Accept`] if the system does not know.
    pub fn local_address(&self) -> Result<SocketAddr, ReceiveError> {
        self.listener.local_addr().map_err(ReceiveError::Accept)
    }

    /// Waits for a guest, takes it in, and returns once it runs here.
    ///
    /// Strangers, peers of another version and sources that leave before they have said what they bring are turned away
    /// without ending the wait.
    ///
    /// # Errors
    /// [`ReceiveError`] if a guest was refused, or a migration began and failed. The guest does not run here then;
    /// what had arrived is freed. The receiver may be used again.
    pub fn receive<H: GuestHost>(&self, host: &H) -> Result<Arrival<H::Guest>, ReceiveError> {
        let hello = |message| match message {
            Message::Hello(hello) => Ok(hello),
            other => Err(other),
        };
        let (mut control, mut hello) = self.await_opening(hello, &Refusal::OnlyGuests)?;
        let from = control.peer_address();
        let mut attempt = loop {
            tracing::info!("{} wants to come from {from}, {} MiB", hello.name, hello.ram.total_bytes() >> 20);
            match self.prepare(host, &hello, &mut control) {
                Ok(attempt) => break attempt,
                Err(ReceiveError::Refused(refusal)) => {
                    control.send(&Message::Refused(refusal.clone()))?;
                    // A source that was free to choose offers another transport on the same connection.
                    let again = matches!(refusal, Refusal::Transport(_))
                        .then(|| control.receive("another HELLO", Some(HELLO_MAX)));
                    let Some(Ok(Message::Hello(next))) = again else { return Err(refusal.into()) };
                    hello = next;
                }
                Err(error) => {
                    let _ = control.send(&Message::Abort(hello.epoch, error.to_string()));
                    return Err(error);
                }
            }
        };
        match attempt.run(&mut control) {
            Ok(()) => Ok(Arrival { guest: attempt.guest, from }),
            Err(error) => Err(attempt.fail(&mut control, error)),
        }
    }

    /// Waits for somebody who brings what is `wanted`. Who brings the other kind of thing is told so.
    pub(crate) fn await_opening<T>(
        &self,
        wanted: impl Fn(Message) -> Result<T, Message>,
        otherwise: &Refusal,
    ) -> Result<(ControlChannel, T), ReceiveError> {
        loop {
            let mut control = self.accept()?;
            let from = control.peer_address();
            let refusal = match control.receive("HELLO", Some(HELLO_MAX)).map(&wanted) {
                Ok(Ok(opening)) => return Ok((control, opening)),
                Ok(Err(other)) => {
                    tracing::warn!("{from} began with {} and was turned away", other.name());
                    matches!(other, Message::Hello(_) | Message::OfferImage(_)).then(|| otherwise.clone())
                }
                Err(error) => {
                    tracing::warn!("{from} was turned away: {error}");
                    match error {
                        ControlError::Wire(error) => Some(Refusal::Incompatible(error.to_string())),
                        _ => None,
                    }
                }
            };
            if let Some(refusal) = refusal {
                let _ = control.send(&Message::Refused(refusal));
            }
        }
    }

    fn accept(&self) -> Result<ControlChannel, ReceiveError> {
        loop {
            let (mut stream, from) = self.listener.accept().map_err(ReceiveError::Accept)?;
            match read_preamble(&mut stream, HELLO_MAX) {
                Ok(preamble) if preamble.role == Role::Control => match ControlChannel::answer(stream) {
                    Ok(control) => return Ok(control),
                    Err(error) => tracing::warn!("{from} went away: {error}"),
                },
                Ok(_) => tracing::warn!("{from} brings a data lane, but no migration is under way"),
                Err(error) => {
                    tracing::warn!("{from} was turned away: {error}");
                    // Told in our own terms, so that a peer of another version can name both.
                    let _ = greet(&stream);
                }
            }
        }
    }

    /// Step 1: makes the machine and the lanes' ends, or refuses.
    fn prepare<H: GuestHost>(
        &self,
        host: &H,
        hello: &Hello,
        control: &mut ControlChannel,
    ) -> Result<Attempt<H::Guest>, ReceiveError> {
        let proposal = Proposal { name: &hello.name, ram: &hello.ram, details: &hello.details };
        let guest = host.prepare(&proposal)?;
        let ram = guest.ram()?;
        if ram.layout() != hello.ram {
            return Err(Refusal::Incompatible("its RAM would lie at other addresses here".into()).into());
        }
        let mut landing = land(&hello.lanes, control, &ram, self.pin_max_bytes)
            .map_err(|error| ReceiveError::Refused(Refusal::Transport(error.to_string())))?;
        control.send(&Message::Ready(landing.ready()))?;
        landing.connect(&self.listener)?;
        Ok(Attempt::new(guest, ram, landing, hello.epoch))
    }
}

/// A guest that has arrived and runs here.
#[derive(Debug)]
pub struct Arrival<G> {
    /// The guest.
    pub guest: G,
    /// Whence it came.
    pub from: SocketAddr,
}

/// Answers what the source asks while pages arrive, until FINAL, which comes with the digests sent before it.
pub(crate) fn answer_rounds(
    landing: &mut dyn Landing,
    control: &mut ControlChannel,
    blocks_max: usize,
) -> Result<(Final, Vec<Digest>), ReceiveError> {
    let mut digests = Vec::new();
    loop {
        // A round may take hours; that the source is alive, the connection's keepalive tells.
        match control.receive("the next round", None)? {
            Message::RegisterSlices(slices) => {
                let keys = landing.register(&slices)?;
                control.send(&Message::SliceKeys(keys))?;
            }
            Message::ReleaseSlices(slices) => landing.release(&slices)?,
            Message::RoundClosed(round) => landing.await_round(round)?,
            Message::Digests(more) if digests.len() + more.len() <= blocks_max => digests.extend(more),
            Message::Final(last) => {
                landing.await_round(last.round)?;
                return Ok((last, digests));
            }
            Message::Abort(_, reason) => return Err(ReceiveError::SourceGaveUp(reason)),
            other => return Err(ReceiveError::OutOfTurn(other.name())),
        }
    }
}

/// How long whoever connects has to say what they want: they have nothing to wait for.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(5);

//! A guest that a source offers, and the five steps of its arrival.

use std::net::SocketAddr;
use std::sync::mpsc;

use sterna_trust::Fingerprint;

use super::acceptor::with_acceptor;
use super::complete::Completed;
use super::error::ReceiveError;
use super::options::Options;
use super::prepare::Prepared;
use crate::control::ControlChannel;
use crate::guest::{DestinationGuest, GuestHost, RunOutcome};
use crate::memory::RamLayout;
use crate::progress::{Event, Observer};
use crate::session::{Listener, Reconnect, Sheltered, next_opening, prepare_any};
use crate::state::GuestClaim;
use crate::wire::{AttemptId, Hello, Message, Refusal};

/// A guest that a source offers: the source is connected, and waits for an answer.
#[derive(Debug)]
pub struct Incoming<'receiver> {
    listener: &'receiver Listener,
    control: ControlChannel,
    hello: Hello,
}

/// A guest that has arrived and was started on this host.
#[derive(Debug)]
pub struct Arrival<G> {
    /// The guest.
    pub guest: G,
    /// Whether the guest runs. If its VMM does not know, it belongs to this host all the same, and the source
    /// never runs it again.
    pub started: RunOutcome,
    /// The claim of its name on this host: keep it as long as the guest lives.
    pub claim: GuestClaim,
    /// The address of its source.
    pub from: SocketAddr,
    /// The attempt in which it came.
    pub attempt_id: AttemptId,
    /// The key that its source has proved; `None` without TLS.
    pub owner: Option<Fingerprint>,
    /// Whether the source knows that the guest runs on this host, and has recorded that. If not, the source
    /// is in doubt and asks: let [`Receiver::answer_until_done`](super::Receiver::answer_until_done) answer.
    pub settled: bool,
}

impl<'receiver> Incoming<'receiver> {
    pub(super) fn new(listener: &'receiver Listener, control: ControlChannel, hello: Hello) -> Self {
        Self { listener, control, hello }
    }

    /// The guest's name at its source.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.hello.name
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> &RamLayout {
        &self.hello.ram
    }

    /// Whence it came.
    #[must_use]
    pub fn from(&self) -> SocketAddr {
        self.control.peer_address()
    }

    /// Refuses the guest. It runs on at its source.
    pub fn refuse(mut self, refusal: Refusal) {
        // The source may be gone.
        let _ = self.control.send(&Message::Refused(refusal));
    }

    /// Receives the guest, and returns once it runs on this host.
    ///
    /// # Errors
    /// [`ReceiveError`] if the guest was refused, or did not arrive. It does not run on this host then, and
    /// its memory is freed.
    pub fn receive<H: GuestHost>(
        mut self,
        host: &H,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Arrival<H::Guest>, ReceiveError> {
        let observer = &Sheltered::new(observer);
        // For an earlier guest it may have been too late.
        options.cancel.reopen();
        options.cancel.ends_waits_for(self.control.liveness())?;
        let arrived = self.take_in(host, options, observer).map_err(|error| error.explained(&options.cancel));
        if let Err(ReceiveError::Refused(refusal)) = &arrived {
            observer.event(&Event::Refused { why: refusal.to_string() });
        }
        arrived
    }

    fn take_in<H: GuestHost>(
        &mut self,
        host: &H,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Arrival<H::Guest>, ReceiveError> {
        let Self { listener, control, hello } = self;
        let from = control.peer_address();
        loop {
            let prepared = prepare_any(hello, control, |hello, control| {
                let mib = hello.ram.total_bytes() >> 20;
                tracing::info!("{} wants to come from {from}, {mib} MiB", hello.name);
                let (name, ram_bytes) = (hello.name.clone(), hello.ram.total_bytes());
                observer.event(&Event::Incoming { name, from, ram_bytes });
                Prepared::new((host, *listener), (options, observer), hello, control)
            })?;
            let (attempt_id, owner) = (hello.attempt_id, control.identity());
            let steps = |reconnects: &mpsc::Receiver<Reconnect>| steps(prepared, control, reconnects);
            match with_acceptor(listener, (attempt_id, owner), steps) {
                Ok(Completed { guest, started, claim, settled }) => {
                    return Ok(Arrival { guest, started, claim, from, attempt_id, owner, settled });
                }
                Err(ReceiveError::LanesFailed(reason)) => {
                    tracing::warn!("{} begins anew over other lanes: {reason}", hello.name);
                    *hello = next_opening(control)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Steps 2 to 5.
fn steps<G: DestinationGuest>(
    prepared: Prepared<'_, G>,
    control: &mut ControlChannel,
    reconnects: &mpsc::Receiver<Reconnect>,
) -> Result<Completed<G>, ReceiveError> {
    let filled = prepared.fill(control)?;
    let running = filled.switch(control, reconnects)?;
    Ok(running.complete(control))
}

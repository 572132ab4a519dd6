//! The destination's side of a migration: the same five steps as at the [source](crate::source).
//!
//! Under RDMA this side does nothing in steps 2 and 3: pages appear in guest RAM. In step 4 the order is what keeps a late
//! write away from a running guest: **revoke, then compare, then load, then PREPARED**.

mod acceptor;
mod attempt;
mod durable_handover;
mod error;
mod pending;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::SockRef;

pub use error::ReceiveError;
pub use pending::{ArrivalPhase, PendingArrival, WordOutcome};

use self::acceptor::with_acceptor;
use self::attempt::Attempt;
use self::durable_handover::DurableHandover;
use crate::control::{ControlChannel, ControlError, greet, read_preamble};
use crate::guest::{self, Guest, GuestHost, Proposal, RunOutcome};
use crate::lock::Lock;
use crate::memory::GuestRam;
use crate::panics::caught_or;
use crate::saved_state::{IncomingState, STATE_MAX_DEFAULT};
use crate::session::{HELLO_MAX, Opening, SessionError, explain_lanes, next_opening, prepare_any};
use crate::state::{GuestClaim, HostState, StateError};
use crate::transport::{LaneReceiver, land};
use crate::wire::{AttemptId, Hello, Message, Outcome, Refusal, Role, SwitchCosts};

/// A socket at which guests may arrive.
#[derive(Debug)]
pub struct Receiver {
    pub(crate) listener: TcpListener,
    pub(crate) pin_max_bytes: Option<u64>,
    state: HostState,
    takeover_timeout: Duration,
    pending: PendingArrival,
    lock: Option<Lock>,
    state_max_bytes: u64,
}

impl Receiver {
    /// Listens at an address; port 0 picks a free one. What becomes of the guests is recorded in `state`.
    ///
    /// # Errors
    /// [`ReceiveError::Listen`] if the address is not this host's, or is in use.
    pub fn bind(address: SocketAddr, state: HostState) -> Result<Self, ReceiveError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })?;
        let pending = PendingArrival::default();
        let state_max_bytes = STATE_MAX_DEFAULT;
        Ok(Self {
            listener,
            pin_max_bytes: None,
            state,
            takeover_timeout: TAKEOVER_TIMEOUT,
            pending,
            lock: None,
            state_max_bytes,
        })
    }

    /// The same, with at most so much RAM registered for RDMA, and so pinned, at once; `None`: as much as `RLIMIT_MEMLOCK`
    /// allows. A guest with more has its chunks registered in turn.
    #[must_use]
    pub fn with_pin_limit(self, pin_max_bytes: Option<u64>) -> Self {
        Self { pin_max_bytes, ..self }
    }

    /// The same, holding a guest that is ready for so long when its source is lost, and giving it up then; ten minutes
    /// unless told otherwise.
    #[must_use]
    pub fn with_takeover_timeout(self, takeover_timeout: Duration) -> Self {
        Self { takeover_timeout, ..self }
    }

    /// The same, with a lock that arbitrates between the hosts: only a guest that has it at the source is taken, and it is taken
    /// before that guest runs here. Keep a clone for as long as the guest runs.
    #[must_use]
    pub fn with_lock(self, lock: Option<Lock>) -> Self {
        Self { lock, ..self }
    }

    /// The same, taking no saved state that is longer; 1 GiB unless told otherwise. It is held in memory until it is loaded.
    #[must_use]
    pub fn with_state_max(self, state_max_bytes: u64) -> Self {
        Self { state_max_bytes, ..self }
    }

    /// The operator's handle on a guest that arrives.
    #[must_use]
    pub fn pending(&self) -> PendingArrival {
        self.pending.clone()
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
    /// without ending the wait. Sources that ask what became of an earlier guest get an answer.
    ///
    /// # Errors
    /// [`ReceiveError`] if a guest was refused, or a migration began and failed. The guest does not run here then;
    /// what had arrived is freed. The receiver may be used again.
    pub fn receive<H: GuestHost>(&self, host: &H) -> Result<Arrival<H::Guest>, ReceiveError> {
        let (mut control, mut hello): (_, Hello) = self.await_opening()?;
        let from = control.peer_address();
        loop {
            let mut attempt = prepare_any(&mut hello, &mut control, |hello, control| {
                let mib = hello.ram.total_bytes() >> 20;
                tracing::info!("{} wants to come from {from}, {mib} MiB", hello.name);
                self.prepare(host, hello, control)
            })?;
            let attempt_id = hello.attempt_id;
            match with_acceptor(self, attempt_id, |reconnects| {
                caught_or(|| attempt.run(&mut control, reconnects))
            }) {
                Ok(settled) => {
                    let (guest, started, claim) = attempt.arrived();
                    return Ok(Arrival { guest, started, claim, from, attempt_id, settled });
                }
                Err(ReceiveError::LanesFailed(reason)) => {
                    tracing::warn!("{} begins anew over other lanes: {reason}", hello.name);
                    attempt.discard();
                    hello = next_opening(&mut control)?;
                }
                Err(error) => return Err(attempt.fail(&mut control, error)),
            }
        }
    }

    /// Waits for a source that brings this kind of thing. Sources that bring the other kind are refused.
    pub(crate) fn await_opening<O: Opening>(&self) -> Result<(ControlChannel, O), SessionError> {
        loop {
            let mut control = self.accept()?;
            let from = control.peer_address();
            let refusal = match control.receive("HELLO", Some(HELLO_MAX)).map(O::of) {
                Ok(Ok(opening)) => return Ok((control, opening)),
                Ok(Err(other)) => match *other {
                    Message::Ask(attempt_id) => {
                        self.answer(&mut control, attempt_id);
                        None
                    }
                    other => {
                        tracing::warn!("{from} began with {} and was turned away", other.name());
                        matches!(other, Message::Hello(_) | Message::OfferImage(_)).then_some(O::OTHERS)
                    }
                },
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

    /// Tells a source what is on record of an attempt; whether it knows then that its guest runs here, and has recorded that.
    fn answer(&self, control: &mut ControlChannel, attempt_id: AttemptId) -> bool {
        let from = control.peer_address();
        let Some(outcome) = durable_handover::outcome(&self.state, attempt_id) else { return false };
        tracing::info!("{from} asks about attempt {attempt_id:?}: {outcome:?}");
        if let Err(error) = control.send(&Message::Outcome(attempt_id, outcome)) {
            tracing::warn!("{from} asked and went away: {error}");
            return false;
        }
        outcome == Outcome::Running
            && control.receive("DONE", Some(HELLO_MAX)).is_ok_and(|done| done == Message::Done(attempt_id))
    }

    fn accept(&self) -> Result<ControlChannel, SessionError> {
        loop {
            if let Some(control) = self.accept_within(None, HELLO_MAX)? {
                return Ok(control);
            }
        }
    }

    /// The next control connection, if one comes within this time. Whoever connects has `greeting_max` to say what they are.
    fn accept_within(
        &self,
        limit: Option<Duration>,
        greeting_max: Duration,
    ) -> Result<Option<ControlChannel>, SessionError> {
        // accept(2) heeds the receive timeout.
        SockRef::from(&self.listener).set_read_timeout(limit).map_err(SessionError::Accept)?;
        let (mut stream, from) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(SessionError::Accept(error)),
        };
        match read_preamble(&mut stream, greeting_max) {
            Ok(preamble) if preamble.role == Role::Control => match ControlChannel::answer(stream) {
                Ok(control) => return Ok(Some(control)),
                Err(error) => tracing::warn!("{from} went away: {error}"),
            },
            Ok(_) => tracing::warn!("{from} brings a data lane that no migration here waits for"),
            Err(error) => {
                tracing::warn!("{from} was turned away: {error}");
                // Told in our own terms, so that a peer of another version can name both.
                let _ = greet(&stream);
            }
        }
        Ok(None)
    }

    /// Step 1: makes the machine and the lanes' ends, or refuses.
    fn prepare<H: GuestHost>(
        &self,
        host: &H,
        hello: &Hello,
        control: &mut ControlChannel,
    ) -> Result<Attempt<H::Guest>, ReceiveError> {
        self.check_lock(hello)?;
        let proposal = Proposal { name: &hello.name, ram: &hello.ram, details: &hello.details };
        let guest = host.prepare(&proposal)?;
        match self.connect_to(&guest, hello, control) {
            Ok((ram, lane_receiver, handover)) => {
                let holding = (self.takeover_timeout, self.pending.clone());
                let state = IncomingState::new(self.state_max_bytes);
                let handover = (handover, self.lock.clone());
                Ok(Attempt::new(guest, (&ram, lane_receiver, state), handover, holding))
            }
            Err(error) => {
                guest::discard(guest);
                Err(error)
            }
        }
    }

    /// Claims the guest's name, and connects the lanes to its RAM.
    fn connect_to(
        &self,
        guest: &dyn Guest,
        hello: &Hello,
        control: &mut ControlChannel,
    ) -> Result<(GuestRam, Box<dyn LaneReceiver>, DurableHandover), ReceiveError> {
        let refused = |error: StateError| match error {
            StateError::Claimed { name, .. } => Refusal::NameTaken(name),
            error => Refusal::State(error.to_string().chars().take(REASON_CHARS_MAX).collect()),
        };
        let claim = self.state.claim(guest.name()).map_err(refused)?;
        let handover = DurableHandover::new(claim, control.peer_address().to_string(), hello.attempt_id)
            .map_err(refused)?;
        let ram = guest.ram()?;
        if ram.layout() != hello.ram {
            return Err(Refusal::Incompatible("its RAM would lie at other addresses here".into()).into());
        }
        let mut lane_receiver = land(&hello.lanes, control, &ram, self.pin_max_bytes)
            .map_err(|error| ReceiveError::Refused(Refusal::Transport(error.to_string())))?;
        let [record_us, revoke_us] = [handover.record_time(), lane_receiver.revoke_time()]
            .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        let state_max_bytes = self.state_max_bytes;
        control.send(&Message::Ready(
            lane_receiver.ready(),
            SwitchCosts { record_us, revoke_us, state_max_bytes },
        ))?;
        control.expect_state(hello.state_bytes.min(state_max_bytes));
        lane_receiver.connect(&self.listener).map_err(|error| explain_lanes(error, control))?;
        Ok((ram, lane_receiver, handover))
    }

    /// Both ends have a lock, the same, and it arbitrates between them; or neither has one.
    fn check_lock(&self, hello: &Hello) -> Result<(), Refusal> {
        match (&self.lock, hello.lock) {
            (None, None) => Ok(()),
            (Some(lock), Some(token)) => lock
                .arbitrates(token)
                .map_err(|error| Refusal::Lock(error.to_string().chars().take(REASON_CHARS_MAX).collect())),
            (None, Some(_)) => Err(Refusal::LockMissing),
            (Some(_), None) => Err(Refusal::LockUnknown),
        }
    }
}

/// A guest that has arrived and was started here.
#[derive(Debug)]
pub struct Arrival<G> {
    /// The guest.
    pub guest: G,
    /// Whether it runs. If its VMM does not say, it is this host's all the same, and the source never runs it again.
    pub started: RunOutcome,
    /// Its name on this host: keep it for as long as the guest lives.
    pub claim: GuestClaim,
    /// Whence it came.
    pub from: SocketAddr,
    /// The attempt in which it came.
    pub attempt_id: AttemptId,
    /// Whether the source knows that it runs here, and has recorded that. If not, the source is in doubt and asks: have
    /// [`Receiver::answer_until_done`] answer.
    pub settled: bool,
}

/// How much of an error that names a path a refusal tells.
const REASON_CHARS_MAX: usize = 1000;

/// How long a guest that is ready is held for a source that is lost.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(600);

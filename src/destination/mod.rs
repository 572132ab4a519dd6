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
use crate::state::{GuestClaim, HostState, StateError};
use crate::transport::{LaneReceiver, TransportError, land};
use crate::verify::DestinationDigests;
use crate::wire::{AttemptId, BlockDigests, Final, Hello, Message, Outcome, Refusal, Role, SwitchCosts};

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
        let hello = |message| match message {
            Message::Hello(hello) => Ok(hello),
            other => Err(Box::new(other)),
        };
        let (mut control, mut hello) = self.await_opening(hello, &Refusal::OnlyGuests)?;
        let from = control.peer_address();
        loop {
            let mut attempt = self.prepare_any(host, &mut hello, &mut control)?;
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
                    hello = match control.receive("another HELLO", Some(HELLO_MAX))? {
                        Message::Hello(next) => next,
                        Message::Abort(_, reason) => return Err(ReceiveError::SourceGaveUp(reason)),
                        other => return Err(ReceiveError::OutOfTurn(other.name())),
                    };
                }
                Err(error) => return Err(attempt.fail(&mut control, error)),
            }
        }
    }

    /// Step 1, until the source has offered a transport that there is here.
    fn prepare_any<H: GuestHost>(
        &self,
        host: &H,
        hello: &mut Hello,
        control: &mut ControlChannel,
    ) -> Result<Attempt<H::Guest>, ReceiveError> {
        let from = control.peer_address();
        loop {
            tracing::info!("{} wants to come from {from}, {} MiB", hello.name, hello.ram.total_bytes() >> 20);
            match caught_or(|| self.prepare(host, hello, control)) {
                Ok(attempt) => return Ok(attempt),
                Err(ReceiveError::Refused(refusal)) => {
                    control.send(&Message::Refused(refusal.clone()))?;
                    // A source that was free to choose offers another transport on the same connection.
                    let again = matches!(refusal, Refusal::Transport(_))
                        .then(|| control.receive("another HELLO", Some(HELLO_MAX)));
                    let Some(Ok(Message::Hello(next))) = again else { return Err(refusal.into()) };
                    *hello = next;
                }
                Err(error) => {
                    let _ = control.send(&Message::Abort(hello.attempt_id, error.to_string()));
                    return Err(error);
                }
            }
        }
    }

    /// Waits for somebody who brings what is `wanted`. Who brings the other kind of thing is told so.
    pub(crate) fn await_opening<T>(
        &self,
        wanted: impl Fn(Message) -> Result<T, Box<Message>>,
        otherwise: &Refusal,
    ) -> Result<(ControlChannel, T), ReceiveError> {
        loop {
            let mut control = self.accept()?;
            let from = control.peer_address();
            let refusal = match control.receive("HELLO", Some(HELLO_MAX)).map(&wanted) {
                Ok(Ok(opening)) => return Ok((control, opening)),
                Ok(Err(other)) => match *other {
                    Message::Ask(attempt_id) => {
                        self.answer(&mut control, attempt_id);
                        None
                    }
                    other => {
                        tracing::warn!("{from} began with {} and was turned away", other.name());
                        matches!(other, Message::Hello(_) | Message::OfferImage(_)).then(|| otherwise.clone())
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

    fn accept(&self) -> Result<ControlChannel, ReceiveError> {
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
    ) -> Result<Option<ControlChannel>, ReceiveError> {
        // accept(2) heeds the receive timeout.
        SockRef::from(&self.listener).set_read_timeout(limit).map_err(ReceiveError::Accept)?;
        let (mut stream, from) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(ReceiveError::Accept(error)),
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
        lane_receiver.connect(&self.listener).map_err(|error| explained(error, control))?;
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

/// Why the lanes do not come: the source's word of it explains more than that it has gone.
fn explained(error: TransportError, control: &mut ControlChannel) -> ReceiveError {
    let said = matches!(error, TransportError::Control(_))
        .then(|| control.receive("the source's reason", Some(Duration::ZERO)));
    match said {
        Some(Ok(Message::Abort(_, reason))) => ReceiveError::SourceGaveUp(reason),
        _ => error.into(),
    }
}

/// Answers what the source asks while pages arrive, until FINAL. Of a guest `checks` takes the digests of RAM, and `state` what is
/// saved of it.
pub(crate) fn answer_rounds(
    lane_receiver: &mut dyn LaneReceiver,
    control: &mut ControlChannel,
    mut of_guest: Option<(&mut DestinationDigests, &mut IncomingState)>,
) -> Result<Final, ReceiveError> {
    loop {
        // A round may take hours; that the source is alive, its beats tell.
        match control.receive("the next round", None)? {
            Message::RegisterChunks(chunks) => {
                let keys = lane_receiver.register(&chunks)?;
                control.send(&Message::ChunkKeys(keys))?;
            }
            Message::ReleaseChunks(chunks) => lane_receiver.release(&chunks)?,
            Message::RoundClosed(round) => lane_receiver.await_round(round)?,
            Message::BlockDigests(BlockDigests { now, digests }) => {
                let (checks, _) = of_guest.as_mut().ok_or(ReceiveError::OutOfTurn("digests"))?;
                checks.note(&digests)?;
                if now {
                    control.send(&Message::Checked(checks.compare_now(&digests)?))?;
                }
            }
            Message::State(frame) => {
                let (_, state) = of_guest.as_mut().ok_or(ReceiveError::OutOfTurn("a saved state"))?;
                state.push(frame)?;
            }
            Message::Final(last) => {
                lane_receiver.await_round(last.round)?;
                return Ok(last);
            }
            Message::Abort(_, reason) => return Err(ReceiveError::SourceGaveUp(reason)),
            Message::LanesFailed(_, reason) => return Err(ReceiveError::LanesFailed(reason)),
            other => return Err(ReceiveError::OutOfTurn(other.name())),
        }
    }
}

/// Tells the source that the lanes failed here, whose ends are gone; what it makes of that.
pub(crate) fn await_other_lanes(
    control: &mut ControlChannel,
    attempt_id: AttemptId,
    error: &TransportError,
) -> ReceiveError {
    if let Err(error) = control.send(&Message::LanesFailed(attempt_id, error.to_string())) {
        return error.into();
    }
    loop {
        // It notices at its next write; that it is alive, its beats tell.
        match control.receive("word of other lanes", None) {
            Ok(Message::LanesFailed(_, reason)) => return ReceiveError::LanesFailed(reason),
            Ok(Message::Abort(_, reason)) => return ReceiveError::SourceGaveUp(reason),
            // On their way since before.
            Ok(
                Message::RegisterChunks(_)
                | Message::ReleaseChunks(_)
                | Message::RoundClosed(_)
                | Message::Digests(_)
                | Message::BlockDigests(_)
                | Message::State(_)
                | Message::Final(_),
            ) => {}
            Ok(other) => return ReceiveError::OutOfTurn(other.name()),
            Err(error) => return error.into(),
        }
    }
}

/// How long whoever connects has to say what they want: they have nothing to wait for.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(5);

/// How much of an error that names a path a refusal tells.
const REASON_CHARS_MAX: usize = 1000;

/// How long a guest that is ready is held for a source that is lost.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(600);

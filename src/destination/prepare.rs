//! Step 1: the machine is made, its RAM reserved and the lanes connected, or the guest is refused.

use super::arriving::Arriving;
use super::durable_handover::DurableHandover;
use super::error::ReceiveError;
use super::lane_ends::LaneEnds;
use super::options::Options;
use super::pending::ArrivalPhase;
use crate::control::ControlChannel;
use crate::guest::{self, DestinationGuest, Guest, GuestHost, Proposal};
use crate::memory::GuestRam;
use crate::progress::{Event, Observer};
use crate::saved_state::IncomingState;
use crate::session::{Listener, explain_lanes};
use crate::state::StateError;
use crate::transport::{Destination, LaneReceiver};
use crate::verify::DestinationDigests;
use crate::wire::{Hello, LaneReady, Message, Refusal, SwitchCosts};

/// A machine with RAM that the source's lanes can write to.
pub(super) struct Prepared<'attempt, G> {
    pub(super) arriving: Arriving<'attempt, G>,
    /// The digests of its RAM to compare.
    pub(super) digests: DestinationDigests,
    /// The part of its saved state that has arrived.
    pub(super) state: IncomingState,
}

impl<'attempt, G: DestinationGuest> Prepared<'attempt, G> {
    /// Makes the machine that `hello` describes, and connects the lanes.
    ///
    /// # Errors
    /// [`ReceiveError::Refused`] before the source was allowed to connect; or another error, after which
    /// nothing is left.
    pub(super) fn new<H: GuestHost<Guest = G>>(
        (host, listener): (&H, &Listener),
        (options, observer): (&'attempt Options, &'attempt dyn Observer),
        hello: &Hello,
        control: &mut ControlChannel,
    ) -> Result<Self, ReceiveError> {
        check_lock(options, hello)?;
        let Hello { name, ram, details, .. } = hello;
        let guest = host.prepare(&Proposal { name, ram, details, from: control.peer_address() })?;
        match connect(&guest, (listener, options), hello, control) {
            Ok((ram, lane_receiver, handover)) => {
                options.pending.set(ArrivalPhase::Incoming, None);
                observer.event(&Event::LanesConnected);
                let state = IncomingState::new(options.state_max_bytes());
                let digests = DestinationDigests::new(&ram);
                let lanes = LaneEnds::new(lane_receiver);
                Ok(Self { arriving: Arriving { guest, lanes, handover, options, observer }, digests, state })
            }
            Err(error) => {
                guest::discard(guest);
                Err(error)
            }
        }
    }
}

/// Claims the guest's name, and connects the lanes to its RAM.
fn connect(
    guest: &dyn Guest,
    (listener, options): (&Listener, &Options),
    hello: &Hello,
    control: &mut ControlChannel,
) -> Result<(GuestRam, Box<dyn LaneReceiver>, DurableHandover), ReceiveError> {
    let refused = |error: StateError| match error {
        StateError::Claimed { name, .. } => Refusal::NameTaken(name),
        error => Refusal::State(error.to_string().chars().take(REASON_CHARS_MAX).collect()),
    };
    let owner = control.identity();
    let sender = (control.peer_address().ip(), owner);
    let claim = listener.state().claim_from(sender, guest.name()).map_err(refused)?;
    let handover = DurableHandover::new(claim, (control.peer_address().to_string(), owner), hello.attempt_id)
        .map_err(refused)?;
    let ram = guest.ram()?;
    if ram.layout() != hello.ram {
        return Err(Refusal::Incompatible("its RAM would lie at other addresses here".into()).into());
    }
    let mut lane_receiver = options.transports.receive(&hello.lanes, &Destination { control, ram: &ram })?;
    let [record_us, revoke_us] = [handover.record_time(), lane_receiver.revoke_time()]
        .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    let lanes = listener.lanes(lane_receiver.token(), owner);
    let state_max_bytes = options.state_max_bytes();
    control.send(&Message::Ready(
        LaneReady { body: lane_receiver.ready()? },
        SwitchCosts { record_us, revoke_us, state_max_bytes },
    ))?;
    control.expect_state(hello.state_bytes.min(state_max_bytes));
    lane_receiver.connect(&lanes).map_err(|error| explain_lanes(error, control))?;
    Ok((ram, lane_receiver, handover))
}

/// Fails unless both ends have the same lock and it arbitrates between them, or neither has one.
fn check_lock(options: &Options, hello: &Hello) -> Result<(), Refusal> {
    match (&options.lock, hello.lock) {
        (None, None) => Ok(()),
        (Some(lock), Some(token)) => lock
            .arbitrates(token)
            .map_err(|error| Refusal::Lock(error.to_string().chars().take(REASON_CHARS_MAX).collect())),
        (None, Some(_)) => Err(Refusal::LockMissing),
        (Some(_), None) => Err(Refusal::LockUnknown),
    }
}

/// How many characters of an error that contains a path a refusal quotes.
const REASON_CHARS_MAX: usize = 1000;

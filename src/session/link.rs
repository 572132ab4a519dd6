//! A destination that has accepted, with the control channel and the lanes to it.

use std::thread;
use std::time::{Duration, Instant};

use rayon::ThreadPool;
use sterna_trust::Right;

use super::cancel::Cancel;
use super::connect::{NAP_MAX, connect};
use super::error::SessionError;
use super::open::{FellBack, Opened, give_up, open};
use super::pass::{Pass, PrecopyPass, Sent};
use super::send_gate::SendGate;
use crate::control::{ControlChannel, STEP_MAX, Security};
use crate::convergence::HandoverCost;
use crate::dirty::{DirtyBitmap, DirtyLog, Stripes};
use crate::memory::GuestRam;
use crate::panics::caught_or;
use crate::progress::Event;
use crate::transport::{Offer, Registration, Transport, TransportError, Transports};
use crate::wire::{AttemptId, LaneOffer, Message, Refusal, SwitchCosts};

/// A destination that has reserved everything, and the lanes to it.
pub(crate) struct Link {
    pub(crate) attempt_id: AttemptId,
    pub(crate) control: ControlChannel,
    pub(crate) transport: Box<dyn Transport>,
    /// Why this transport was chosen, for people.
    pub(crate) reason: String,
    /// The first transport and the reason for which its lanes were given up, if they were.
    pub(crate) fell_back: Option<FellBack>,
    /// The destination's own costs of a switch.
    pub(crate) costs_there: SwitchCosts,
    transports: Transports,
    /// Its position in the list.
    place: usize,
    /// Its name.
    pub(crate) scheme: String,
    pub(crate) ram: GuestRam,
    /// A worker for each lane.
    pub(crate) pool: ThreadPool,
    pub(crate) lanes: u8,
}

impl Link {
    /// Finds the destination, sends the `opening` that describes the guest or the file, and connects the
    /// lanes if the destination accepts.
    pub(crate) fn make(
        ram: GuestRam,
        (to, allowed): (&str, (&Security, Right)),
        (transports, lanes): (&Transports, Option<u8>),
        cancel: &Cancel,
        opening: impl Fn(AttemptId, LaneOffer) -> Message,
    ) -> Result<Self, SessionError> {
        let deadline = Instant::now() + BUSY_MAX;
        let (mut control, opened) = loop {
            let mut control = connect(to, allowed, cancel)?;
            let offer = Offer::first(transports, &control, &ram, lanes)?;
            match open(&mut control, &ram, (offer, transports, lanes), cancel, &opening) {
                Ok(opened) => break (control, opened),
                Err(SessionError::Refused(Refusal::Busy)) if Instant::now() < deadline => {
                    thread::sleep(NAP_MAX);
                }
                Err(error) => return Err(error),
            }
        };
        let Opened { attempt_id, transport, place, scheme, reason, lanes, fell_back, costs_there } = opened;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(lanes.into())
            .thread_name(|index| format!("lane-{index}"))
            .build()
            .map_err(|error| SessionError::System { what: "threads", error: error.to_string() });
        match pool {
            Ok(pool) => Ok(Self {
                attempt_id,
                control,
                transport,
                reason,
                fell_back,
                costs_there,
                transports: transports.clone(),
                place,
                scheme,
                ram,
                pool,
                lanes,
            }),
            Err(error) => Err(give_up(&mut control, attempt_id, error)),
        }
    }

    /// The event that describes the link.
    pub(crate) fn connected(&self) -> Event {
        Event::Connected {
            transport: self.scheme.clone(),
            via: format!("{} ({})", self.transport.via(), self.reason),
            total_pages: self.ram.layout().total_pages(),
        }
    }

    /// The next transport in the list, if the migration may continue over it: the device or the network
    /// failed.
    pub(crate) fn falls_back_to(&self, cause: &TransportError) -> Option<&str> {
        self.transports.behind(self.place).filter(|_| cause.may_fall_back())
    }

    /// Begins anew over the next transport in the list, in a new attempt, after the lanes failed for this
    /// reason: nothing that they sent counts.
    pub(crate) fn fall_back(
        &mut self,
        why: String,
        cancel: &Cancel,
        opening: impl Fn(AttemptId, LaneOffer) -> Message,
    ) -> Result<(), SessionError> {
        self.control.send(&Message::LanesFailed(self.attempt_id, why.clone()))?;
        // The same number as before, for which workers and stripes exist.
        let (transports, lanes) = (&self.transports, Some(self.lanes));
        let fell_back = FellBack { from: self.scheme.clone(), why };
        let peer = (&self.control, &self.ram, lanes);
        let offer = Offer::next(self.place, transports, peer, fell_back.reason())?;
        let how = (offer, transports, lanes);
        let opened = open(&mut self.control, &self.ram, how, cancel, opening)?;
        (self.attempt_id, self.transport, self.reason) = (opened.attempt_id, opened.transport, opened.reason);
        (self.place, self.scheme, self.costs_there) = (opened.place, opened.scheme, opened.costs_there);
        self.fell_back = Some(opened.fell_back.unwrap_or(fell_back));
        Ok(())
    }

    /// Sends every page set in `dirty`, tracking it again in `log`, and reports the closed pass to the
    /// destination. Fails when the destination is silent for too long, because one-sided writes to its memory
    /// would continue.
    pub(crate) fn send_pass(
        &mut self,
        pass: Pass,
        (dirty, stripes): (&DirtyBitmap, &Stripes),
        log: Option<&dyn DirtyLog>,
        gate: SendGate<'_>,
    ) -> Result<Sent, SessionError> {
        let liveness = self.control.liveness();
        let check = || liveness.check().map_err(SessionError::from).and_then(|()| (gate.check)());
        let gate = SendGate { check: &check, ..gate };
        let sent = self.send_pages(pass, (dirty, stripes), log, gate).map_err(|error| match error {
            // The lanes were shut down because of this; its cause explains more.
            SessionError::Transport(_) => liveness.check_heard().err().map_or(error, SessionError::from),
            error => error,
        })?;
        self.control.send(&Message::RoundClosed(pass.number))?;
        Ok(sent)
    }

    /// Registers memory ahead for a round that sends these pages, as far as the budget allows.
    pub(crate) fn register_ahead(&mut self, dirty: &DirtyBitmap) -> Result<(), SessionError> {
        let Self { control, transport, .. } = self;
        match transport.begin_round() {
            (_, None) => Ok(()),
            (_, Some(registration)) => Ok(registration.prepare(dirty, control)?),
        }
    }

    fn send_pages(
        &mut self,
        pass: Pass,
        (dirty, stripes): (&DirtyBitmap, &Stripes),
        log: Option<&dyn DirtyLog>,
        gate: SendGate<'_>,
    ) -> Result<Sent, SessionError> {
        let Self { control, transport, ram, pool, .. } = self;
        let rounds = |registration| PrecopyPass { ram, log, stripes, pool, gate, registration };
        match transport.begin_round() {
            (lanes, None) => rounds(None).send(pass, dirty, lanes),
            (lanes, Some(registration)) => {
                let mut sent = Err(SessionError::Cancelled);
                // The registration runs on this thread beside the lanes' workers, so no thread is started.
                let supplied = pool.in_place_scope(|scope| {
                    scope.spawn(|_| {
                        let _end = EndOnDrop(registration);
                        sent = caught_or(|| rounds(Some(registration)).send(pass, dirty, lanes));
                    });
                    caught_or(|| Ok::<_, SessionError>(registration.run(dirty, control)?))
                });
                match (supplied, sent) {
                    // A failure that forbids other lanes counts more.
                    (Err(registration), Err(lanes))
                        if registration.may_fall_back() && !lanes.may_fall_back() =>
                    {
                        Err(lanes)
                    }
                    // The failure of the registration explains more than the lanes' lack of memory.
                    (Err(registration), _) => Err(registration),
                    (Ok(()), sent) => sent,
                }
            }
        }
    }

    /// The cost of handing over at both ends with these pages left, with this duration of a record at the
    /// source.
    pub(crate) fn handover_cost(&self, dirty: &DirtyBitmap, here: Duration) -> HandoverCost {
        // A larger value is wrong, and no limit would allow it.
        let bounded = |micros| Duration::from_micros(micros).min(STEP_MAX);
        let SwitchCosts { record_us, revoke_us, .. } = self.costs_there;
        let registration = self.transport.registration_expected(dirty);
        HandoverCost {
            register: registration.paused,
            register_ahead: registration.ahead,
            revoke: bounded(revoke_us),
            record_here: here,
            record_there: bounded(record_us),
        }
    }

    /// The destination's own reason if it gave up, which explains more than a broken connection.
    pub(crate) fn explain(&mut self, cause: SessionError) -> SessionError {
        match cause {
            SessionError::Transport(TransportError::PeerGaveUp(reason)) => {
                SessionError::destination_gave_up(reason)
            }
            SessionError::Transport(_) | SessionError::Control(_) => {
                match self.control.receive("the destination's reason", Some(REASON_MAX)) {
                    Ok(Message::Abort(attempt_id, reason)) if attempt_id == self.attempt_id => {
                        SessionError::destination_gave_up(reason)
                    }
                    Ok(Message::LanesFailed(attempt_id, reason)) if attempt_id == self.attempt_id => {
                        TransportError::FailedThere(reason).into()
                    }
                    _ => cause,
                }
            }
            _ => cause,
        }
    }
}

/// Ends a registration, also if the lanes panic: it runs until then.
struct EndOnDrop<'registration>(&'registration dyn Registration);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// How long to retry a busy destination: it may be ending a failed attempt.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// How long to wait for the reason of a destination that may have given up: it is in flight, or does not
/// exist.
const REASON_MAX: Duration = Duration::from_secs(1);

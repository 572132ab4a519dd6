//! The destination's side of a migration: the same five steps as at the [source](crate::source).
//!
//! Under RDMA this side does nothing in steps 2 and 3: pages appear in guest RAM. In step 4 the order is what keeps a late
//! write away from a running guest: **revoke, then compare, then load, then PREPARED**.

mod error;

use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

pub use error::ReceiveError;

use crate::control::{ControlChannel, ControlError, read_preamble};
use crate::digest::{self, Digest};
use crate::guest::{Guest, GuestHost, Proposal};
use crate::handover::{DestinationAction, DestinationEvent, DestinationHandover, HandoverError};
use crate::memory::GuestRam;
use crate::transport::{Landing, land};
use crate::wire::{Completion, Epoch, Final, Hello, Message, Refusal, Role};

/// A socket at which guests may arrive.
#[derive(Debug)]
pub struct Receiver {
    pub(crate) listener: TcpListener,
}

impl Receiver {
    /// Listens at an address; port 0 picks a free one.
    ///
    /// # Errors
    /// [`ReceiveError::Listen`] if the address is not this host's, or is in use.
    pub fn bind(address: SocketAddr) -> Result<Self, ReceiveError> {
        let listener = TcpListener::bind(address)
            .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })?;
        Ok(Self { listener })
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
    /// [`ReceiveError`] if a guest was refused, or a migration began and failed. The guest does not run here then, unless
    /// that is [`ReceiveError::Start`]; what had arrived is freed. The receiver may be used again.
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
                    let _ = ControlChannel::answer(stream);
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
        let mut landing = land(&hello.lanes, control, &ram)
            .map_err(|error| ReceiveError::Refused(Refusal::Transport(error.to_string())))?;
        control.send(&Message::Ready(landing.ready()))?;
        landing.connect(&self.listener)?;
        let handover = DestinationHandover::new(hello.epoch);
        Ok(Attempt { guest, ram, landing: Some(landing), epoch: hello.epoch, handover, digests: Vec::new() })
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

struct Attempt<G> {
    guest: G,
    ram: GuestRam,
    landing: Option<Box<dyn Landing>>,
    epoch: Epoch,
    handover: DestinationHandover,
    digests: Vec<Digest>,
}

impl<G: Guest> Attempt<G> {
    fn run(&mut self, control: &mut ControlChannel) -> Result<(), ReceiveError> {
        let last = self.rounds(control)?;
        let go = self.switch(control, &last)?;
        self.complete(control, go);
        Ok(())
    }

    /// Steps 2 and 3.
    fn rounds(&mut self, control: &mut ControlChannel) -> Result<Final, ReceiveError> {
        let blocks_max = digest::blocks(&self.ram.layout()).len();
        let landing = self.landing.as_mut().ok_or(ReceiveError::OutOfTurn("pages after FINAL"))?;
        let (last, digests) = answer_rounds(landing.as_mut(), control, blocks_max)?;
        self.digests = digests;
        Ok(last)
    }

    /// Step 4: revoke, compare, load, PREPARED, and run on GO; returns when that came.
    fn switch(&mut self, control: &mut ControlChannel, last: &Final) -> Result<Instant, ReceiveError> {
        self.advance(DestinationEvent::Final(last.epoch), DestinationAction::Revoke)?;
        if let Some(landing) = self.landing.take() {
            landing.revoke()?;
        }
        self.advance(DestinationEvent::Revoked, DestinationAction::Load)?;
        let comparing = Instant::now();
        let verified_pages = self.compare(last.compare_blocks)?;
        let verify_us = micros(comparing.elapsed());
        let loading = Instant::now();
        self.guest.load(&last.state)?;
        let completion = Completion { verified_pages, verify_us, load_us: micros(loading.elapsed()) };
        self.advance(DestinationEvent::Loaded, DestinationAction::SendPrepared)?;
        control.send(&Message::Prepared(self.epoch, completion))?;
        let message = control.receive("GO", Some(GO_MAX))?;
        let go = Instant::now();
        match message {
            Message::Go(epoch) => {
                self.advance(DestinationEvent::Go(epoch), DestinationAction::Run)?;
                self.guest.resume().map_err(ReceiveError::Start)?;
            }
            Message::Abort(_, reason) => return Err(ReceiveError::SourceGaveUp(reason)),
            other => return Err(ReceiveError::OutOfTurn(other.name())),
        }
        Ok(go)
    }

    /// Tells the handover what happened; what it wants done must be what comes next here.
    fn advance(&mut self, event: DestinationEvent, next: DestinationAction) -> Result<(), ReceiveError> {
        if self.handover.on(event)? == next { Ok(()) } else { Err(HandoverError::OtherAction.into()) }
    }

    /// Step 5: tells the source that the guest runs, and that it lives. Nothing that fails here changes whose it is.
    fn complete(&mut self, control: &mut ControlChannel, go: Instant) {
        let told = control.send(&Message::Running(self.epoch)).and_then(|()| match self.first_beat(go) {
            Some((count, after_go)) => control.send(&Message::Alive(self.epoch, count, micros(after_go))),
            None => Ok(()),
        });
        if let Err(error) = told {
            tracing::warn!("the guest runs here, and the source could not be told: {error}");
        }
    }

    /// The guest's first heartbeat after GO: its count, and how long after. `None` if it gives none, or not in time.
    fn first_beat(&self, go: Instant) -> Option<(u64, Duration)> {
        while go.elapsed() < FIRST_BEAT_MAX {
            let beat = self.guest.heartbeat()?;
            let since_go = go.elapsed();
            if beat.age <= since_go {
                return Some((beat.count, since_go - beat.age));
            }
            thread::sleep(Duration::from_micros(100));
        }
        None
    }

    /// After a failure: gives the guest up, if it may be given up, and tells the source.
    fn fail(mut self, control: &mut ControlChannel, error: ReceiveError) -> ReceiveError {
        self.landing = None;
        if self.handover.on(DestinationEvent::Failed) == Ok(DestinationAction::Discard)
            && !matches!(error, ReceiveError::SourceGaveUp(_))
        {
            // Only now, with nothing left that could run, may the source hear that this epoch never ran.
            drop(self.guest);
            let _ = control.send(&Message::Abort(self.epoch, error.to_string()));
        }
        error
    }

    /// Compares RAM with the source's digests, if it sent any; returns how many pages were compared.
    fn compare(&self, compare_blocks: u64) -> Result<u64, ReceiveError> {
        if compare_blocks == 0 && self.digests.is_empty() {
            return Ok(0);
        }
        let blocks = digest::blocks(&self.ram.layout());
        if compare_blocks != blocks.len() as u64 || self.digests.len() != blocks.len() {
            return Err(ReceiveError::OutOfTurn("an incomplete list of digests"));
        }
        let ours = digest::digests(&self.ram, &blocks)?;
        let differing: Vec<_> = blocks
            .iter()
            .zip(ours.iter().zip(&self.digests))
            .filter(|(_, (ours, theirs))| ours != theirs)
            .collect();
        match differing.first() {
            None => Ok(self.ram.layout().total_pages()),
            Some((first, _)) => Err(ReceiveError::MemoryDiffers {
                blocks: differing.len(),
                of: blocks.len(),
                region: first.region,
                first_page: first.first_page,
            }),
        }
    }
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

/// How long to stay prepared. The source sends GO at once, or is gone.
const GO_MAX: Duration = Duration::from_secs(60);

/// How long to look for the guest's first heartbeat.
const FIRST_BEAT_MAX: Duration = Duration::from_secs(4);

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::dirty::DirtyLog;
    use crate::guest::{GuestError, Heartbeat};
    use crate::transport::TransportError;
    use crate::wire::{LaneReady, SliceKey, SliceRange, Token};

    const EPOCH: Epoch = Epoch([3; 16]);

    /// What happened, in order: shared by a landing and a guest that write it down.
    type Journal = Arc<Mutex<Vec<&'static str>>>;

    #[derive(Debug)]
    struct NotedLanding {
        journal: Journal,
        lets_go: bool,
    }

    impl Landing for NotedLanding {
        fn ready(&self) -> LaneReady {
            LaneReady::Tcp(Token::NONE)
        }

        fn connect(&mut self, _listener: &TcpListener) -> Result<(), TransportError> {
            Ok(())
        }

        fn register(&mut self, _slices: &[SliceRange]) -> Result<Vec<SliceKey>, TransportError> {
            Ok(Vec::new())
        }

        fn await_round(&mut self, _round: u32) -> Result<(), TransportError> {
            Ok(())
        }

        fn revoke(self: Box<Self>) -> Result<(), TransportError> {
            self.journal.lock().unwrap().push("revoke");
            let kept = || TransportError::Disagreement("the device does not let go".into());
            self.lets_go.then_some(()).ok_or_else(kept)
        }
    }

    struct NotedGuest(Journal);

    impl Guest for NotedGuest {
        fn name(&self) -> &str {
            "tern"
        }

        fn details(&self) -> Result<Vec<u8>, GuestError> {
            Ok(Vec::new())
        }

        fn ram(&self) -> Result<GuestRam, GuestError> {
            let memory: GuestMemoryMmap<()> =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).map_err(GuestError::new)?;
            GuestRam::from_vm_memory(&memory).map_err(GuestError::new)
        }

        fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
            Err(GuestError::new("not at a destination"))
        }

        fn pause(&self) -> Result<(), GuestError> {
            Ok(())
        }

        fn resume(&self) -> Result<(), GuestError> {
            self.0.lock().unwrap().push("run");
            Ok(())
        }

        fn throttle(&self, _percent: u8) -> Result<(), GuestError> {
            Ok(())
        }

        fn save(&self) -> Result<Vec<u8>, GuestError> {
            Ok(Vec::new())
        }

        fn load(&self, _state: &[u8]) -> Result<(), GuestError> {
            self.0.lock().unwrap().push("load");
            Ok(())
        }

        fn heartbeat(&self) -> Option<Heartbeat> {
            None
        }
    }

    /// The switch with a source that says GO to whatever it hears; what it did, in order, and how it ended.
    fn switch(lets_go: bool) -> (Vec<&'static str>, Result<Instant, ReceiveError>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let source = thread::spawn(move || {
            let mut control = ControlChannel::connect(&address).unwrap();
            if control.receive("PREPARED", None).is_ok() {
                control.send(&Message::Go(EPOCH)).unwrap();
            }
        });
        let (mut stream, _) = listener.accept().unwrap();
        read_preamble(&mut stream, HELLO_MAX).unwrap();
        let mut control = ControlChannel::answer(stream).unwrap();
        let journal = Journal::default();
        let guest = NotedGuest(journal.clone());
        let mut attempt = Attempt {
            ram: guest.ram().unwrap(),
            guest,
            landing: Some(Box::new(NotedLanding { journal: journal.clone(), lets_go })),
            epoch: EPOCH,
            handover: DestinationHandover::new(EPOCH),
            digests: Vec::new(),
        };
        let last = Final { epoch: EPOCH, round: 1, compare_blocks: 0, state: Vec::new() };
        let result = attempt.switch(&mut control, &last);
        drop(control);
        source.join().unwrap();
        let noted = journal.lock().unwrap().clone();
        (noted, result)
    }

    #[test]
    fn remote_access_is_taken_away_before_the_state_is_loaded_and_the_guest_runs() {
        let (noted, result) = switch(true);
        assert!(result.is_ok());
        assert_eq!(noted, ["revoke", "load", "run"]);
    }

    #[test]
    fn a_guest_that_a_device_may_still_write_to_is_not_run() {
        let (noted, result) = switch(false);
        assert!(matches!(result, Err(ReceiveError::Transport(_))));
        assert_eq!(noted, ["revoke"]);
    }
}

//! Steps 2 to 5 of one guest's arrival.

use std::thread;
use std::time::{Duration, Instant};

use super::{ReceiveError, answer_rounds};
use crate::control::ControlChannel;
use crate::digest::{self, Digest};
use crate::guest::Guest;
use crate::handover::{DestinationAction, DestinationEvent, DestinationHandover, HandoverError, Mark};
use crate::memory::GuestRam;
use crate::transport::Landing;
use crate::wire::{Completion, Epoch, Final, Message};

/// One attempt, from the first page on.
pub(super) struct Attempt<G> {
    pub(super) guest: G,
    ram: GuestRam,
    landing: Option<Box<dyn Landing>>,
    epoch: Epoch,
    handover: DestinationHandover,
    digests: Vec<Digest>,
}

impl<G: Guest> Attempt<G> {
    pub(super) fn new(guest: G, ram: GuestRam, landing: Box<dyn Landing>, epoch: Epoch) -> Self {
        let handover = DestinationHandover::new(epoch);
        Self { guest, ram, landing: Some(landing), epoch, handover, digests: Vec::new() }
    }

    pub(super) fn run(&mut self, control: &mut ControlChannel) -> Result<(), ReceiveError> {
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
        let revoking = Instant::now();
        if let Some(landing) = self.landing.take() {
            landing.revoke()?;
        }
        let revoke_us = micros(revoking.elapsed());
        self.advance(DestinationEvent::Revoked, DestinationAction::Load)?;
        let comparing = Instant::now();
        let verified_pages = self.compare(last.compare_blocks)?;
        let verify_us = micros(comparing.elapsed());
        let loading = Instant::now();
        self.guest.load(&last.state)?;
        let load_us = micros(loading.elapsed());
        let completion = Completion { verified_pages, revoke_us, verify_us, load_us };
        self.advance(DestinationEvent::Loaded, DestinationAction::Record(Mark::Prepared))?;
        self.advance(DestinationEvent::Recorded(Mark::Prepared), DestinationAction::SendPrepared)?;
        control.send(&Message::Prepared(self.epoch, completion))?;
        let message = control.receive("GO", Some(GO_MAX))?;
        let go = Instant::now();
        match message {
            Message::Go(epoch) => {
                self.advance(DestinationEvent::Go(epoch), DestinationAction::Record(Mark::Running))?;
                self.advance(DestinationEvent::Recorded(Mark::Running), DestinationAction::Run)?;
                self.guest.resume().map_err(ReceiveError::Start)?;
                self.advance(DestinationEvent::Started, DestinationAction::SendRunning)?;
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
    pub(super) fn fail(mut self, control: &mut ControlChannel, error: ReceiveError) -> ReceiveError {
        self.landing = None;
        let error = match (error, control.pulse().check_heard()) {
            // Lanes that were shut down because of it explain less.
            (ReceiveError::Transport(_), Err(silent)) => silent.into(),
            (error, _) => error,
        };
        let event = match error {
            ReceiveError::Start(_) => DestinationEvent::NotStarted,
            _ => DestinationEvent::Failed,
        };
        let mut action = self.handover.on(event);
        while let Ok(DestinationAction::Record(mark)) = action {
            action = self.handover.on(DestinationEvent::Recorded(mark));
        }
        if action == Ok(DestinationAction::Refuse) && !matches!(error, ReceiveError::SourceGaveUp(_)) {
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

/// How long to stay prepared. The source sends GO at once, or is gone.
const GO_MAX: Duration = Duration::from_secs(60);

/// How long to look for the guest's first heartbeat.
const FIRST_BEAT_MAX: Duration = Duration::from_secs(4);

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::control::read_preamble;
    use crate::destination::HELLO_MAX;
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

        fn release(&mut self, _slices: &[SliceRange]) -> Result<(), TransportError> {
            Ok(())
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
        let ram = guest.ram().unwrap();
        let landing = Box::new(NotedLanding { journal: journal.clone(), lets_go });
        let mut attempt = Attempt::new(guest, ram, landing, EPOCH);
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

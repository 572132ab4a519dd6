//! Step 5: the source learns that the guest runs, and that it lives.

use std::thread;
use std::time::{Duration, Instant};

use super::arriving::Arriving;
use crate::control::ControlChannel;
use crate::guest::{DestinationGuest, RunOutcome, heartbeat_of};
use crate::panics::{Panicked, caught};
use crate::state::GuestClaim;
use crate::wire::Message;

/// A guest that belongs to this host.
pub(super) struct Running<'attempt, G> {
    pub(super) arriving: Arriving<'attempt, G>,
    /// The VMM's report on the start.
    pub(super) started: RunOutcome,
    /// When GO came.
    pub(super) go: Instant,
}

/// The same, once the source was informed.
pub(super) struct Completed<G> {
    pub(super) guest: G,
    pub(super) started: RunOutcome,
    pub(super) claim: GuestClaim,
    /// Whether the source knows that the guest runs on this host.
    pub(super) settled: bool,
}

impl<G: DestinationGuest> Running<'_, G> {
    /// Sends RUNNING and the first heartbeat. A failure does not change the guest's owner.
    pub(super) fn complete(mut self, control: &mut ControlChannel) -> Completed<G> {
        let settled = caught(|| self.report(control)).unwrap_or_else(|Panicked(text)| {
            tracing::error!("the guest runs here, and the source may not know: a defect of sterna: {text}");
            false
        });
        let Self { arriving, started, .. } = self;
        Completed { guest: arriving.guest, started, claim: arriving.handover.into_claim(), settled }
    }

    /// Whether the source has confirmed it.
    fn report(&mut self, control: &mut ControlChannel) -> bool {
        let attempt_id = self.arriving.handover.attempt_id();
        let told = control.send(&Message::Running(attempt_id));
        let told = told.and_then(|()| match self.first_beat() {
            Some((count, after_go)) => control.send(&Message::Alive(attempt_id, count, micros(after_go))),
            None => Ok(()),
        });
        let done = told.and_then(|()| control.receive("DONE", Some(DONE_MAX)));
        // Only now, because it occupies a processor that the guest and these messages need. It runs to its
        // end alone: no thread waits for it.
        drop(self.arriving.lanes.release_beside(self.arriving.guest.name()));
        match done {
            Ok(done) => done == Message::Done(attempt_id),
            Err(error) => {
                tracing::warn!("the guest runs here, and the source has not said that it knows: {error}");
                false
            }
        }
    }

    /// The guest's first heartbeat after GO: its count, and the time since. `None` without a heartbeat in
    /// time.
    fn first_beat(&self) -> Option<(u64, Duration)> {
        while self.go.elapsed() < FIRST_BEAT_MAX {
            let beat = heartbeat_of(&self.arriving.guest)?;
            let since_go = self.go.elapsed();
            if beat.age <= since_go {
                return Some((beat.count, since_go - beat.age));
            }
            thread::sleep(Duration::from_micros(100));
        }
        None
    }
}

/// How long to wait for the source's confirmation of RUNNING.
const DONE_MAX: Duration = Duration::from_secs(2);

/// How long to wait for the guest's first heartbeat.
const FIRST_BEAT_MAX: Duration = Duration::from_secs(4);

/// A time on the wire.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

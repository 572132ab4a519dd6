//! The destination's ends of the lanes: first open to the source, then revoked, then released.

use std::thread::{self, JoinHandle};

use crate::transport::{LaneReceiver, Remains, TransportError};

/// The source's access to guest RAM, or what is left after revocation.
#[derive(Debug)]
pub(super) struct LaneEnds {
    lane_receiver: Option<Box<dyn LaneReceiver>>,
    /// What revocation leaves, until the guest runs or is given up.
    remains: Option<Box<dyn Remains>>,
}

impl LaneEnds {
    pub(super) fn new(lane_receiver: Box<dyn LaneReceiver>) -> Self {
        Self { lane_receiver: Some(lane_receiver), remains: None }
    }

    /// The ends while they are open.
    pub(super) fn open(&mut self) -> Option<&mut dyn LaneReceiver> {
        match &mut self.lane_receiver {
            Some(lane_receiver) => Some(lane_receiver.as_mut()),
            None => None,
        }
    }

    /// Revokes all remote access to guest RAM.
    pub(super) fn revoke(&mut self) -> Result<(), TransportError> {
        if let Some(lane_receiver) = self.lane_receiver.take() {
            self.remains = Some(lane_receiver.revoke()?);
        }
        Ok(())
    }

    /// The same for a guest that will not run: a failure is only logged, because this memory never runs.
    pub(super) fn take_access_away(&mut self) {
        if let Err(error) = self.revoke() {
            tracing::warn!("a device may still hold memory of a guest that was discarded: {error}");
        }
    }

    /// Releases what is left.
    pub(super) fn release(&mut self, name: &str) {
        if let Some(remains) = self.remains.take() {
            release(name, remains);
        }
    }

    /// The same in a thread of its own: the release takes time that grows with RAM, and the guest runs
    /// meanwhile, or its source waits for the message that it does not.
    pub(super) fn release_beside(&mut self, name: &str) -> Option<JoinHandle<()>> {
        let remains = self.remains.take()?;
        let name = name.to_owned();
        let release = move || release(&name, remains);
        // If no thread can start, the drop releases everything in this thread.
        thread::Builder::new().name("release".into()).spawn(release).ok()
    }
}

fn release(name: &str, remains: Box<dyn Remains>) {
    if let Err(leak) = remains.release() {
        tracing::warn!("{name}: {leak}");
    }
}

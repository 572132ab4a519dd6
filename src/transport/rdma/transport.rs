//! The source's connected lanes.

use std::time::Duration;

use super::registrar::{Registrar, share_of};
use crate::dirty::DirtyBitmap;
use crate::transport::lane::{Lane, Registration, RegistrationCost, Transport};

/// The source's lanes, and the registrar of the chunks they write from. Lanes come first, so that queue pairs
/// drop before regions.
#[derive(Debug)]
pub(super) struct RdmaTransport {
    via: String,
    lanes: Vec<Box<dyn Lane>>,
    registrar: Registrar,
    /// How long each lane had waited before this round.
    waited_before: Vec<Duration>,
    /// How long lanes waited in the latest earlier round that had something to register, and how much that
    /// was.
    latest_wait: (Duration, u64),
}

impl RdmaTransport {
    pub(super) fn new(via: String, lanes: Vec<Box<dyn Lane>>, registrar: Registrar) -> Self {
        let waited_before = vec![Duration::ZERO; lanes.len()];
        Self { via, lanes, registrar, waited_before, latest_wait: (Duration::ZERO, 0) }
    }

    /// The wait of the latest round that had something to register, and how much that was.
    fn latest_wait(&self) -> (Duration, u64) {
        match self.registrar.registered_in_round() {
            0 => self.latest_wait,
            bytes => (self.waited(), bytes),
        }
    }
}

impl Transport for RdmaTransport {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    fn via(&self) -> String {
        self.via.clone()
    }

    fn registration_expected(&self, dirty: &DirtyBitmap) -> RegistrationCost {
        let (ahead, surplus_bytes) = self.registrar.expected(dirty);
        let (waited, bytes) = self.latest_wait();
        RegistrationCost { ahead, paused: share_of(waited, surplus_bytes, bytes) }
    }

    fn waited(&self) -> Duration {
        let waits = self.lanes.iter().zip(&self.waited_before).map(|(lane, before)| lane.waited() - *before);
        waits.max().unwrap_or_default()
    }

    fn begin_round(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>) {
        self.latest_wait = self.latest_wait();
        self.waited_before = self.lanes.iter().map(|lane| lane.waited()).collect();
        self.registrar.begin();
        (&mut self.lanes, Some(&self.registrar))
    }
}

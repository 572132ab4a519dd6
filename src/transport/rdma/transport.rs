use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sterna_rdma::{Capacity, CompletionQueue, Endpoint, PeerAccess, ProtectionDomain, QueuePair};

use super::RdmaTuning;
use super::chunks::{CHUNK_BYTES_MIN, Chunks};
use super::lane::RdmaLane;
use super::path::RdmaPath;
use super::pinning::{Budget, pin_budget};
use super::registrar::{Registrar, share_of};
use crate::control::PeerLiveness;
use crate::dirty::DirtyBitmap;
use crate::memory::GuestRam;
use crate::transport::{
    Lane, Registration, RegistrationCost, Transport, TransportError, TransportKind, count,
};

/// The source's queue pairs before they are connected.
pub(crate) struct RdmaOffer {
    path: RdmaPath,
    domain: Arc<ProtectionDomain>,
    ends: Vec<(QueuePair, Arc<CompletionQueue>)>,
    ram: GuestRam,
    tuning: RdmaTuning,
    /// How much RAM may be registered at once at this end; `None`: all of it.
    budget: Option<Budget>,
}

impl RdmaOffer {
    /// Makes the queue pairs of `lanes` lanes.
    pub(crate) fn make(
        path: RdmaPath,
        ram: &GuestRam,
        lanes: u8,
        tuning: RdmaTuning,
        by_name: bool,
    ) -> Result<Self, TransportError> {
        let tuning = tuning.within(path.device.limits().work_requests);
        let requests = tuning.window_writes;
        let budget = pin_budget(ram, tuning.pin_max_bytes, (lanes.into(), requests + 1), by_name)?;
        let domain = ProtectionDomain::new(&path.device)?;
        let capacity = Capacity {
            send_work_requests: requests,
            receive_work_requests: 1,
            peer_access: PeerAccess::None,
        };
        let end = |_| {
            let completions = CompletionQueue::new(&path.device, requests + 1)?;
            let queue_pair =
                QueuePair::new(&domain, &path.port, &path.gid, &completions, &completions, capacity)?;
            Ok((queue_pair, completions))
        };
        let ends = (0..lanes).map(end).collect::<Result<_, TransportError>>()?;
        Ok(Self { path, domain, ends, ram: ram.clone(), tuning, budget })
    }

    pub(crate) fn count(&self) -> u8 {
        u8::try_from(self.ends.len()).unwrap_or(u8::MAX)
    }

    /// What the destination needs to connect its ends.
    pub(crate) fn endpoints(&self) -> Vec<Endpoint> {
        self.ends.iter().map(|(queue_pair, _)| queue_pair.local_endpoint()).collect()
    }

    /// Connects to the destination's ends, which are connected to these already. The destination may have so
    /// much RAM registered at once.
    pub(crate) fn connect(
        self,
        peers: &[Endpoint],
        pin_max_bytes: Option<u64>,
        liveness: &PeerLiveness,
    ) -> Result<RdmaTransport, TransportError> {
        if peers.len() != self.ends.len() {
            let (offered, answered) = (self.ends.len(), peers.len());
            return Err(TransportError::Disagreement(format!(
                "{offered} lanes offered, {answered} answered"
            )));
        }
        let there = pin_max_bytes.map(Budget::of_destination);
        let budget = [self.budget, there].into_iter().flatten().min_by_key(|budget| budget.bytes);
        let budget_bytes = budget.map(|budget| budget.bytes);
        if let Some(limit_bytes) = budget_bytes.filter(|&bytes| bytes < CHUNK_BYTES_MIN) {
            return Err(TransportError::LockedMemory { needed_bytes: CHUNK_BYTES_MIN, limit_bytes });
        }
        let chunks = Arc::new(Chunks::new(self.ram.layout(), peers.len(), budget_bytes));
        let options = self.path.connect_options();
        let mut lanes: Vec<Box<dyn Lane>> = Vec::with_capacity(peers.len());
        for ((index, peer), (mut queue_pair, completions)) in peers.iter().enumerate().zip(self.ends) {
            queue_pair.connect(peer, &options)?;
            let how = (self.tuning, liveness.clone());
            lanes.push(Box::new(RdmaLane::new(index, queue_pair, completions, chunks.clone(), how)));
        }
        let registrar = Registrar::new(chunks, self.domain, self.ram);
        let mut via = format!("{} on {}", count(lanes.len(), "queue pair"), self.path.describe());
        if let Some(Budget { bytes, limit }) = budget {
            via += &format!(", at most {} MiB pinned: {limit}", bytes >> 20);
        }
        let waited_before = vec![Duration::ZERO; lanes.len()];
        Ok(RdmaTransport { via, lanes, registrar, waited_before, latest_wait: (Duration::ZERO, 0) })
    }
}

impl fmt::Debug for RdmaOffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaOffer").field("reach", &self.path).finish_non_exhaustive()
    }
}

/// The source's lanes, and the registrar of the chunks they write from. Lanes come first, so that queue pairs
/// go before regions.
#[derive(Debug)]
pub(crate) struct RdmaTransport {
    via: String,
    lanes: Vec<Box<dyn Lane>>,
    registrar: Registrar,
    /// How long each lane had waited before this round.
    waited_before: Vec<Duration>,
    /// How long lanes waited in the latest round before this one that had something to register, and how much
    /// that was.
    latest_wait: (Duration, u64),
}

impl RdmaTransport {
    /// The wait of the latest round that had something to register, and how much that was.
    fn latest_wait(&self) -> (Duration, u64) {
        match self.registrar.registered_in_round() {
            0 => self.latest_wait,
            bytes => (self.waited(), bytes),
        }
    }
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
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

    fn parts(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>) {
        self.latest_wait = self.latest_wait();
        self.waited_before = self.lanes.iter().map(|lane| lane.waited()).collect();
        self.registrar.begin();
        (&mut self.lanes, Some(&self.registrar))
    }
}

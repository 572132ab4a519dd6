//! The source's queue pairs before they are connected.

use std::fmt;
use std::sync::Arc;

use sterna_rdma::{Capacity, CompletionQueue, Endpoint, PeerAccess, ProtectionDomain, QueuePair};

use super::chunks::{CHUNK_BYTES_MIN, Chunks};
use super::lane::RdmaLane;
use super::path::RdmaPath;
use super::pinning::{Budget, pin_budget};
use super::registrar::Registrar;
use super::transport::RdmaTransport;
use super::tuning::RdmaTuning;
use super::wire::{Offered, Ready};
use crate::control::{ControlChannel, PeerLiveness};
use crate::memory::GuestRam;
use crate::transport::error::TransportError;
use crate::transport::lane::{Lane, Transport, count};
use crate::transport::provider::SourceOffer;

/// The source's queue pairs before they are connected.
pub(super) struct RdmaOffer {
    path: RdmaPath,
    domain: Arc<ProtectionDomain>,
    ends: Vec<(QueuePair, Arc<CompletionQueue>)>,
    ram: GuestRam,
    tuning: RdmaTuning,
    /// How much RAM may be registered at once at this end; `None`: all of RAM.
    budget: Option<Budget>,
    by_name: bool,
}

impl RdmaOffer {
    /// Makes the queue pairs of `lanes` lanes.
    pub(super) fn make(
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
        Ok(Self { path, domain, ends, ram: ram.clone(), tuning, budget, by_name })
    }

    /// Connects to the destination's ends, which are already connected to these. The destination's limit on
    /// registered RAM is an argument.
    fn connected(
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
        Ok(RdmaTransport::new(via, lanes, registrar))
    }
}

impl SourceOffer for RdmaOffer {
    fn lanes(&self) -> u8 {
        u8::try_from(self.ends.len()).unwrap_or(u8::MAX)
    }

    fn body(&self) -> Result<Vec<u8>, TransportError> {
        let endpoints = self.ends.iter().map(|(queue_pair, _)| queue_pair.local_endpoint()).collect();
        Offered { endpoints, any_device: self.by_name }.encode()
    }

    fn reason(&self) -> String {
        "an RDMA device has the address that reaches the peer".into()
    }

    fn connect(
        self: Box<Self>,
        ready: &[u8],
        control: &ControlChannel,
        _ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        let Ready { endpoints, pin_max_bytes } = Ready::decode(ready)?;
        Ok(Box::new(self.connected(&endpoints, pin_max_bytes, &control.liveness())?))
    }
}

impl fmt::Debug for RdmaOffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaOffer").field("path", &self.path).finish_non_exhaustive()
    }
}

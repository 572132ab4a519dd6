use std::fmt;
use std::sync::Arc;

use sterna_rdma::{
    Capacity, CompletionQueue, ConnectOptions, Endpoint, PeerAccess, ProtectionDomain, QueuePair,
};

use super::WINDOW_REQUESTS;
use super::lane::RdmaLane;
use super::pinning::check_memlock;
use super::reach::RdmaReach;
use super::registrar::Registrar;
use super::slices::Slices;
use crate::memory::GuestRam;
use crate::transport::{Lane, Supply, Transport, TransportError, TransportKind, count};

/// The source's queue pairs before they are connected.
pub(crate) struct RdmaOffer {
    reach: RdmaReach,
    domain: Arc<ProtectionDomain>,
    ends: Vec<(QueuePair, Arc<CompletionQueue>)>,
    ram: GuestRam,
}

impl RdmaOffer {
    /// Makes the queue pairs of `lanes` lanes.
    pub(crate) fn make(reach: RdmaReach, ram: &GuestRam, lanes: u8) -> Result<Self, TransportError> {
        check_memlock(ram)?;
        let domain = ProtectionDomain::new(&reach.device)?;
        let requests = WINDOW_REQUESTS.min(reach.device.limits().work_requests);
        let capacity = Capacity {
            send_work_requests: requests,
            receive_work_requests: 1,
            peer_access: PeerAccess::None,
        };
        let end = |_| {
            let completions = CompletionQueue::new(&reach.device, requests + 1)?;
            let queue_pair =
                QueuePair::new(&domain, &reach.port, &reach.gid, &completions, &completions, capacity)?;
            Ok((queue_pair, completions))
        };
        let ends = (0..lanes).map(end).collect::<Result<_, TransportError>>()?;
        Ok(Self { reach, domain, ends, ram: ram.clone() })
    }

    /// What the destination needs to connect its ends.
    pub(crate) fn endpoints(&self) -> Vec<Endpoint> {
        self.ends.iter().map(|(queue_pair, _)| queue_pair.local_endpoint()).collect()
    }

    /// Connects to the destination's ends, which are connected to these already.
    pub(crate) fn connect(self, peers: &[Endpoint]) -> Result<RdmaTransport, TransportError> {
        if peers.len() != self.ends.len() {
            let (offered, answered) = (self.ends.len(), peers.len());
            return Err(TransportError::Disagreement(format!(
                "{offered} lanes offered, {answered} answered"
            )));
        }
        let slices = Arc::new(Slices::new(self.ram.layout()));
        let mut lanes: Vec<Box<dyn Lane>> = Vec::with_capacity(peers.len());
        for ((index, peer), (mut queue_pair, completions)) in peers.iter().enumerate().zip(self.ends) {
            queue_pair.connect(peer, &ConnectOptions::default())?;
            lanes.push(Box::new(RdmaLane::new(index, queue_pair, completions, slices.clone())));
        }
        let registrar = Registrar::new(slices, self.domain, self.ram);
        Ok(RdmaTransport { via: self.reach.describe(), lanes, registrar })
    }
}

impl fmt::Debug for RdmaOffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaOffer").field("reach", &self.reach).finish_non_exhaustive()
    }
}

/// The source's lanes, and the registrar of the slices they write from. Lanes come first, so that queue pairs go before regions.
#[derive(Debug)]
pub(crate) struct RdmaTransport {
    via: String,
    lanes: Vec<Box<dyn Lane>>,
    registrar: Registrar,
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn via(&self) -> String {
        format!("{} on {}", count(self.lanes.len(), "queue pair"), self.via)
    }

    fn parts(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Supply>) {
        self.registrar.begin();
        (&mut self.lanes, Some(&self.registrar))
    }
}

use std::fmt;
use std::sync::Arc;

use sterna_rdma::{
    Access, Capacity, CompletionQueue, ConnectOptions, Endpoint, MemoryRegion, PeerAccess, ProtectionDomain,
    QueuePair,
};

use super::lane::RdmaLane;
use super::reach::RdmaReach;
use super::registrar::Registrar;
use super::slices::Slices;
use super::{FENCES, WINDOW_REQUESTS};
use crate::memory::{GuestRam, PAGE_BYTES, RamRegion};
use crate::preflight;
use crate::transport::{Lane, Supply, Transport, TransportError, TransportKind, count};
use crate::wire::SliceRange;

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

/// What the queue pairs of the destination's end are made for.
pub(super) fn landing_capacity() -> Capacity {
    Capacity { send_work_requests: 1, receive_work_requests: FENCES, peer_access: PeerAccess::Write }
}

/// Registers a slice of guest RAM.
pub(super) fn register(
    domain: &Arc<ProtectionDomain>,
    ram: &GuestRam,
    range: SliceRange,
    access: Access,
) -> Result<Arc<MemoryRegion>, TransportError> {
    let outside = || {
        let SliceRange { region, first_page, pages } = range;
        crate::memory::MemoryError::OutOfRange { region: region.into(), first_page, pages }
    };
    let region: &RamRegion = ram.regions().get(usize::from(range.region)).ok_or_else(outside)?;
    let offset = range.first_page.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
    let len = range.pages.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
    let (offset, len) = offset.zip(len).ok_or_else(outside)?;
    Ok(MemoryRegion::register(domain, Arc::new(region.clone()), offset, len, access)?)
}

/// Refuses early what the kernel would refuse after pinning half of the guest.
pub(super) fn check_memlock(ram: &GuestRam) -> Result<(), TransportError> {
    let (memlock, needed_bytes) = (preflight::memlock(), ram.layout().total_bytes());
    if memlock.allows(needed_bytes) {
        return Ok(());
    }
    Err(TransportError::LockedMemory { needed_bytes, limit_bytes: memlock.limit_bytes.unwrap_or(0) })
}

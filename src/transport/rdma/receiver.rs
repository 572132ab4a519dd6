//! The destination's queue pairs.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use sterna_rdma::{
    Access, Capacity, Completion, CompletionKind, CompletionQueue, Endpoint, MemoryRegion, PeerAccess,
    ProtectionDomain, QueuePair,
};

use super::bounds::{FENCES, STALL_MAX};
use super::exposed::ExposedRegions;
use super::path::RdmaPath;
use super::pinning::{pin_budget, register};
use super::wire::{ChunkKey, ChunkRange, Keys, Ready, Request};
use crate::memory::GuestRam;
use crate::transport::error::TransportError;
use crate::transport::receiver::LaneReceiver;
use crate::transport::remains::{Leak, Remains};

/// The destination's queue pairs, and the chunks that the source may write to.
pub(crate) struct RdmaReceiver {
    // In the order of teardown: queue pairs first, then the regions that they expose to the source.
    lanes: Vec<ReceivingLane>,
    completions: Arc<CompletionQueue>,
    exposed: ExposedRegions<Arc<MemoryRegion>>,
    /// How much RAM may be registered at once; `None`: all of RAM.
    pin_max_bytes: Option<u64>,
    /// How long destroying the queue pairs took when they were first made.
    revoke_time: Duration,
    domain: Arc<ProtectionDomain>,
    ram: GuestRam,
}

struct ReceivingLane {
    queue_pair: QueuePair,
    /// The last round with an arrived fence.
    fenced: Option<u32>,
}

impl RdmaReceiver {
    /// Makes a queue pair for each one offered and connects it. Registers at most `pin_max_bytes` at once, if
    /// given, and no more than this process may lock.
    pub(crate) fn make(
        path: &RdmaPath,
        ram: &GuestRam,
        offered: &[Endpoint],
        pin_max_bytes: Option<u64>,
        by_name: bool,
    ) -> Result<Self, TransportError> {
        let pin_max_bytes = pin_budget(ram, pin_max_bytes, (offered.len(), FENCES + 1), by_name)?;
        let pin_max_bytes = pin_max_bytes.map(|budget| budget.bytes);
        let domain = ProtectionDomain::new(&path.device)?;
        let lanes = u32::try_from(offered.len()).unwrap_or(u32::MAX);
        let completions = CompletionQueue::new(&path.device, lanes.saturating_mul(FENCES + 1))?;
        let lane = |(lane, peer): (usize, &Endpoint)| {
            let mut queue_pair = QueuePair::new(
                &domain,
                &path.port,
                &path.gid,
                &completions,
                &completions,
                receiver_capacity(),
            )?;
            for _ in 0..FENCES {
                queue_pair.post_receive(0).map_err(|error| TransportError::Post { lane, error })?;
            }
            queue_pair.connect(peer, &path.connect_options())?;
            Ok(queue_pair)
        };
        let all = || offered.iter().enumerate().map(lane).collect::<Result<Vec<_>, TransportError>>();
        // The device determines how long destroying them takes, and the source has to know it before it
        // pauses the guest.
        let mut revoke_time = Duration::MAX;
        for _ in 0..PROBES {
            let probes = all()?;
            let destroying = Instant::now();
            destroy_all(probes)?;
            revoke_time = revoke_time.min(destroying.elapsed());
        }
        let lanes = all()?.into_iter().map(|queue_pair| ReceivingLane { queue_pair, fenced: None }).collect();
        let exposed = ExposedRegions::new(ram.layout(), pin_max_bytes);
        Ok(Self { lanes, completions, exposed, pin_max_bytes, revoke_time, domain, ram: ram.clone() })
    }

    /// Lets the source write to these chunks, if they lie in RAM and within the budget.
    fn register(&mut self, chunks: &[ChunkRange]) -> Result<Vec<ChunkKey>, TransportError> {
        self.exposed.check(chunks)?;
        let (domain, ram) = (&self.domain, &self.ram);
        let registered = chunks
            .into_par_iter()
            .map(|&chunk| Ok((chunk, register(domain, ram, chunk, Access::RemoteWrite)?)))
            .collect::<Result<Vec<_>, TransportError>>()?;
        let key = |(_, region): &(_, Arc<MemoryRegion>)| ChunkKey {
            address: region.address(),
            key: region.remote_key(),
        };
        let keys = registered.iter().map(key).collect();
        self.exposed.extend(registered);
        Ok(keys)
    }

    /// Deregisters these chunks.
    fn release(&mut self, chunks: &[ChunkRange]) -> Result<(), TransportError> {
        for chunk in chunks {
            MemoryRegion::deregister(self.exposed.remove(chunk)?)?;
        }
        Ok(())
    }

    /// Records a fence, and posts a receive for the next one.
    fn take(&mut self, completion: &Completion) -> Result<(), TransportError> {
        let number = completion.queue_pair;
        let Some(lane) = self.lanes.iter().position(|lane| lane.queue_pair.number() == number) else {
            return Ok(());
        };
        let kind = completion.result.map_err(|error| TransportError::Write { lane, error })?;
        let CompletionKind::WriteImmediateReceived { immediate, .. } = kind else { return Ok(()) };
        let end = &mut self.lanes[lane];
        end.fenced = Some(immediate);
        end.queue_pair.post_receive(0).map_err(|error| TransportError::Post { lane, error })
    }
}

impl LaneReceiver for RdmaReceiver {
    fn ready(&self) -> Result<Vec<u8>, TransportError> {
        let endpoints = self.lanes.iter().map(|lane| lane.queue_pair.local_endpoint()).collect();
        Ready { endpoints, pin_max_bytes: self.pin_max_bytes }.encode()
    }

    fn handle(&mut self, request: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        match Request::decode(request)? {
            Request::Register(chunks) => Ok(Some(Keys(self.register(&chunks)?).encode()?)),
            Request::Release(chunks) => self.release(&chunks).map(|()| None),
        }
    }

    fn await_round(&mut self, round: u32) -> Result<(), TransportError> {
        let deadline = Instant::now() + STALL_MAX;
        let mut done = [Completion::BLANK; 16];
        // A later fence counts too: the source may be a round ahead of its messages on the control channel.
        while let Some(lane) = self.lanes.iter().position(|lane| lane.fenced < Some(round)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(TransportError::Stalled { lane, silence: STALL_MAX });
            }
            let count = self.completions.wait(&mut done, left)?;
            done[..count].iter().try_for_each(|completion| self.take(completion))?;
        }
        Ok(())
    }

    fn revoke_time(&self) -> Duration {
        self.revoke_time
    }

    /// Destroys the queue pairs. The memory may stay registered: a device takes a write only on behalf of a
    /// queue pair, and only into regions of that queue pair's protection domain (InfiniBand Architecture
    /// Specification, Volume 1, 10.2.3). This domain was made for this attempt and has no other queue pairs,
    /// so its keys are now useless.
    ///
    /// `ibv_destroy_qp` returns once the device has no use for the queue pair's resources. Before that,
    /// adapters have taken it to RESET, in which they process no packet; their answer follows the writes that
    /// they had begun, on the same bus, because regions are registered without relaxed ordering. Soft-RoCE
    /// waits for the last packet that refers to the queue pair and for its tasks.
    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError> {
        let Self { lanes, completions, exposed, domain, .. } = *self;
        let remains = RdmaRemains { exposed, _completions: completions, _domain: domain };
        destroy_all(lanes.into_iter().map(|lane| lane.queue_pair).collect())?;
        Ok(Box::new(remains))
    }
}

/// Destroys the queue pairs at the same time, because each has to wait for the device; destroys all, even if
/// one is refused.
fn destroy_all(queue_pairs: Vec<QueuePair>) -> Result<(), sterna_rdma::Error> {
    let destroyed: Vec<_> = queue_pairs.into_par_iter().map(QueuePair::destroy).collect();
    destroyed.into_iter().collect()
}

/// The memory that is still registered. In the order of teardown: the protection domain drops after its
/// regions.
struct RdmaRemains {
    exposed: ExposedRegions<Arc<MemoryRegion>>,
    _completions: Arc<CompletionQueue>,
    _domain: Arc<ProtectionDomain>,
}

impl Remains for RdmaRemains {
    fn release(self: Box<Self>) -> Result<(), Leak> {
        let (mut bytes, mut first) = (0, None);
        for region in self.exposed.into_values() {
            let len_bytes = region.len_bytes() as u64;
            if let Err(error) = MemoryRegion::deregister(region) {
                bytes += len_bytes;
                first.get_or_insert(error.into());
            }
        }
        first.map_or(Ok(()), |error| Err(Leak { bytes, error }))
    }
}

impl fmt::Debug for RdmaRemains {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaRemains").field("exposed", &self.exposed.len()).finish_non_exhaustive()
    }
}

/// How often queue pairs are destroyed to measure the time. The quickest counts: disturbances only make it
/// longer, and the first also starts the threads.
const PROBES: u32 = 2;

/// The capacity of the destination's queue pairs.
fn receiver_capacity() -> Capacity {
    Capacity { send_work_requests: 1, receive_work_requests: FENCES, peer_access: PeerAccess::Write }
}

impl fmt::Debug for RdmaReceiver {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lanes, exposed) = (self.lanes.len(), self.exposed.len());
        formatter
            .debug_struct("RdmaReceiver")
            .field("lanes", &lanes)
            .field("exposed", &exposed)
            .finish_non_exhaustive()
    }
}

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;
use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use super::pinning::register;
use super::slices::{Slice, Slices};
use crate::control::{ControlChannel, ControlError, STEP_MAX};
use crate::dirty::DirtyBitmap;
use crate::memory::{GuestRam, PAGE_BYTES, PageRun, TouchedSearch};
use crate::transport::{Supply, TransportError};
use crate::wire::{Message, SliceKey, SliceRange};

/// How many slices are asked for at a time, and registered in parallel at either end.
const BATCH_SLICES: usize = 4;

/// How many batches are asked for ahead: the destination registers one while this side registers another.
const BATCHES_AHEAD: usize = 2;

/// Registers slices at both ends ahead of the lanes that write from and to them.
///
/// Slices without data are left out, and so never pinned: a guest that begins to use one meanwhile makes a lane ask for it.
#[derive(Debug)]
pub(super) struct Registrar {
    slices: Arc<Slices>,
    domain: Arc<ProtectionDomain>,
    ram: GuestRam,
}

impl Registrar {
    pub(super) fn new(slices: Arc<Slices>, domain: Arc<ProtectionDomain>, ram: GuestRam) -> Self {
        Self { slices, domain, ram }
    }

    /// Begins a round. Not in `supply`, which may come to run only after the round has ended.
    pub(super) fn begin(&self) {
        self.slices.begin();
    }

    pub(super) fn registered_bytes(&self) -> u64 {
        self.slices.registered_bytes()
    }

    /// The slices that the lanes will need in a round.
    fn plan(&self, dirty: &DirtyBitmap) -> Result<VecDeque<SliceRange>, TransportError> {
        let mut search = TouchedSearch::default();
        let mut touched = VecDeque::new();
        for range in self.slices.plan(dirty) {
            let region = usize::from(range.region);
            let run = PageRun { region, first_page: range.first_page, pages: range.pages };
            // One look for a hole of many slices: what is written there meanwhile, a lane asks for.
            if !search.expects_hole(run) && search.any_touched(&self.ram.regions()[region], run)? {
                touched.push_back(range);
            }
        }
        Ok(touched)
    }

    fn register_until_over(
        &self,
        mut planned: VecDeque<SliceRange>,
        control: &mut ControlChannel,
    ) -> Result<(), TransportError> {
        let mut asked = VecDeque::with_capacity(BATCHES_AHEAD);
        // The first slice alone, so that the first page leaves soon.
        let mut slices_max = 1;
        loop {
            while asked.len() < BATCHES_AHEAD {
                let batch = self.slices.next(&mut planned, slices_max, asked.is_empty());
                self.evict(batch.evicted, control)?;
                if batch.ranges.is_empty() {
                    break;
                }
                slices_max = BATCH_SLICES;
                control.send(&Message::RegisterSlices(batch.ranges.clone()))?;
                asked.push_back(batch.ranges);
            }
            // Also when the round is over: the answers to what was asked are on their way.
            let Some(ranges) = asked.pop_front() else { return Ok(()) };
            let register = |&range| register(&self.domain, &self.ram, range, Access::LocalRead);
            let local = ranges.par_iter().map(register).collect::<Result<Vec<_>, TransportError>>()?;
            let keys = await_keys(&ranges, control)?;
            for ((range, local), SliceKey { address, key }) in ranges.into_iter().zip(local).zip(keys) {
                self.slices.set(range, Slice { local, remote_address: address, remote_key: key });
            }
        }
    }

    /// Unpins slices at both ends.
    fn evict(
        &self,
        evicted: Vec<(SliceRange, Arc<Slice>)>,
        control: &mut ControlChannel,
    ) -> Result<(), TransportError> {
        let mut ranges = Vec::with_capacity(evicted.len());
        for (range, slice) in evicted {
            // No lane holds it, and its queue pair let go of it before the lane did.
            let slice = Arc::into_inner(slice).ok_or(sterna_rdma::Error::RegionInUse)?;
            MemoryRegion::deregister(slice.local)?;
            ranges.push(range);
        }
        if !ranges.is_empty() {
            control.send(&Message::ReleaseSlices(ranges))?;
        }
        Ok(())
    }
}

impl Supply for Registrar {
    fn supply(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        self.slices.supply(|| self.register_until_over(self.plan(dirty)?, control))
    }

    fn end(&self) {
        self.slices.end();
    }
}

/// The destination's answer to what was asked to be registered.
pub(in crate::transport) fn await_keys(
    ranges: &[SliceRange],
    control: &mut ControlChannel,
) -> Result<Vec<SliceKey>, TransportError> {
    let pages: u64 = ranges.iter().map(|range| range.pages).sum();
    // Fresh memory is zeroed as it is pinned; 16 MiB/s is slow for that.
    let limit = STEP_MAX + Duration::from_secs((pages * PAGE_BYTES) >> 24);
    match control.receive("keys", Some(limit))? {
        Message::SliceKeys(keys) if keys.len() == ranges.len() => Ok(keys),
        Message::SliceKeys(_) => {
            Err(TransportError::Disagreement("another number of keys than was asked for".into()))
        }
        Message::Abort(_, reason) => Err(TransportError::PeerGaveUp(reason)),
        Message::LanesFailed(_, reason) => Err(TransportError::FailedThere(reason)),
        other => Err(ControlError::Unexpected { expected: "keys", got: other.name() }.into()),
    }
}

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use sterna_rdma::{Access, ProtectionDomain};

use super::pinning::register;
use super::slices::{Slice, Slices};
use crate::control::{ControlChannel, ControlError, STEP_MAX};
use crate::dirty::DirtyBitmap;
use crate::memory::{GuestRam, PAGE_BYTES, PageRun};
use crate::transport::{Supply, TransportError};
use crate::wire::{Message, SliceKey, SliceRange};

/// How many slices are asked for ahead: the destination registers one while this side registers another.
const ASKED_AHEAD: usize = 2;

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

    /// The slices that the lanes will need in a round.
    fn plan(&self, dirty: &DirtyBitmap) -> Result<VecDeque<SliceRange>, TransportError> {
        let mut planned = self.slices.missing(dirty);
        let mut holes = Vec::new();
        for range in &planned {
            let region = usize::from(range.region);
            let run = PageRun { region, first_page: range.first_page, pages: range.pages };
            if !self.ram.regions()[region].is_touched(run)? {
                holes.push(*range);
            }
        }
        planned.retain(|range| !holes.contains(range));
        Ok(planned)
    }

    fn register_until_over(
        &self,
        mut planned: VecDeque<SliceRange>,
        control: &mut ControlChannel,
    ) -> Result<(), TransportError> {
        let mut asked = VecDeque::with_capacity(ASKED_AHEAD);
        loop {
            while asked.len() < ASKED_AHEAD {
                // With something asked for already, only what is known to be needed is asked for besides.
                let next = match asked.is_empty() {
                    true => self.slices.next(&mut planned),
                    false => self.slices.next_at_once(&mut planned),
                };
                let Some(range) = next.filter(|range| !asked.contains(range)) else { break };
                control.send(&Message::RegisterSlices(vec![range]))?;
                asked.push_back(range);
            }
            // Also when the round is over: the answers to what was asked are on their way.
            let Some(range) = asked.pop_front() else { return Ok(()) };
            let local = register(&self.domain, &self.ram, range, Access::LocalRead)?;
            let SliceKey { address, key } = await_key(range, control)?;
            self.slices.set(range, Slice { local, remote_address: address, remote_key: key });
        }
    }
}

impl Supply for Registrar {
    fn supply(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        let result = self.plan(dirty).and_then(|planned| self.register_until_over(planned, control));
        if result.is_err() {
            self.slices.fail();
        }
        result
    }

    fn end(&self) {
        self.slices.end();
    }
}

fn await_key(range: SliceRange, control: &mut ControlChannel) -> Result<SliceKey, TransportError> {
    // Fresh memory is zeroed as it is pinned; 16 MiB/s is slow for that.
    let limit = STEP_MAX + Duration::from_secs((range.pages * PAGE_BYTES) >> 24);
    match control.receive("keys", Some(limit))? {
        Message::SliceKeys(keys) => match keys[..] {
            [key] => Ok(key),
            _ => Err(TransportError::Disagreement("another number of keys than was asked for".into())),
        },
        Message::Abort(_, reason) => Err(TransportError::PeerGaveUp(reason)),
        other => Err(ControlError::Unexpected { expected: "keys", got: other.name() }.into()),
    }
}

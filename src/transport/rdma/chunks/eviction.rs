//! The choice of parts to evict.

use std::sync::Arc;

use super::parts::{bytes_of, contains};
use super::queue::Queue;
use super::state::{Slot, State};
use crate::transport::rdma::wire::ChunkRange;

/// How much may be registered at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    /// `None`: all of RAM.
    pub(super) bytes: Option<u64>,
    pub(super) parts: usize,
}

impl Capacity {
    /// Evicts parts that no lane holds or waits for until `part` fits; `None`, and evicts none, if it cannot
    /// fit. Parts that the lanes have not reached yet are evicted only for a part that a lane waits for.
    pub(super) fn make_room<S>(
        self,
        state: &mut State<S>,
        part: ChunkRange,
        wanted: bool,
    ) -> Option<Vec<(ChunkRange, Arc<S>)>> {
        let (mut victims, mut held) = (Vec::new(), Vec::new());
        let mut made = false;
        while !self.has_room(state, part, &victims) {
            if let Some((victim, last_use)) = state.queue.parts.pop_front() {
                let slot = state.slots.get(&victim);
                let Some(slot @ Slot::Here { last_use: now, .. }) = slot else { continue };
                if *now != last_use {
                    continue;
                }
                if !state.may_go(victim, slot) {
                    held.push((victim, last_use));
                    continue;
                }
                if wanted || !state.is_ahead(victim, slot) {
                    victims.push((victim, last_use));
                    continue;
                }
                // The parts behind it are ahead of the lanes as well, except those used since.
                state.queue.parts.push_front((victim, last_use));
            }
            // Making the queue takes time in proportion to the parts, so it is not made for each part.
            let uses = state.uses - state.queue.made_at;
            if made || !wanted && uses < state.slots.len() as u64 / 16 {
                break;
            }
            state.make_queue(&[&victims[..], &held].concat());
            made = true;
        }
        held.into_iter().rev().for_each(|part| state.queue.parts.push_front(part));
        if !self.has_room(state, part, &victims) {
            victims.into_iter().rev().for_each(|victim| state.queue.parts.push_front(victim));
            return None;
        }
        let mut evicted = Vec::with_capacity(victims.len());
        for (victim, _) in victims {
            if let Some(Slot::Here { chunk, .. }) = state.slots.remove(&victim) {
                state.registered_bytes -= bytes_of(victim);
                evicted.push((victim, chunk));
            }
        }
        Some(evicted)
    }

    /// Whether a part fits once these are gone.
    fn has_room<S>(self, state: &State<S>, part: ChunkRange, victims: &[(ChunkRange, u64)]) -> bool {
        let freed_bytes: u64 = victims.iter().map(|&(victim, _)| bytes_of(victim)).sum();
        let bytes = state.registered_bytes - freed_bytes + bytes_of(part);
        let parts = state.slots.len() - victims.len() + 1;
        self.bytes.is_none_or(|bytes_max| bytes <= bytes_max) && parts <= self.parts
    }
}

impl<S> State<S> {
    /// Makes the queue anew, without the parts in `taken`.
    fn make_queue(&mut self, taken: &[(ChunkRange, u64)]) {
        let mut parts = Vec::with_capacity(self.slots.len());
        for (&part, slot) in &self.slots {
            if let Slot::Here { last_use, .. } = slot
                && !taken.contains(&(part, *last_use))
            {
                parts.push((self.is_ahead(part, slot), *last_use, part));
            }
        }
        parts.sort_unstable_by_key(|&(ahead, last_use, _)| (ahead, last_use));
        let parts = parts.into_iter().map(|(_, last_use, part)| (part, last_use)).collect();
        self.queue = Queue { parts, made_at: self.uses };
    }

    /// Whether a part was planned or registered for this round and the lanes have not reached it yet.
    fn is_ahead(&self, part: ChunkRange, slot: &Slot<S>) -> bool {
        let Slot::Here { registered_in, used_in, .. } = slot else { return false };
        // Lanes will not come back in this round to parts that all lanes have passed.
        let passed = self.reached.iter().min().copied().unwrap_or_default();
        let end = (usize::from(part.region), part.first_page + part.pages);
        end > passed
            && *used_in != Some(self.plans)
            && (*registered_in == self.plans || self.dirty.any_in(part))
    }

    /// Whether no lane holds a part, or waits for it.
    fn may_go(&self, part: ChunkRange, slot: &Slot<S>) -> bool {
        let Slot::Here { chunk, .. } = slot else { return false };
        Arc::strong_count(chunk) == 1 && !self.wanted.iter().any(|&page| contains(part, page))
    }
}

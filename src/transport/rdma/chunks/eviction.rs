//! The choice of parts to evict.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Chunks, Slot, State, bytes_of, contains};
use crate::transport::rdma::wire::ChunkRange;

/// Parts in the order of their eviction, each with its last use: parts that the lanes have not reached yet
/// come last, the others least recently used first. One queue serves many evictions; later changes are
/// considered when a part is taken.
#[derive(Debug, Default)]
pub(super) struct Queue {
    parts: VecDeque<(ChunkRange, u64)>,
    /// The number of uses when it was made.
    made_at: u64,
}

impl<S> Chunks<S> {
    /// Evicts parts that no lane holds or waits for until `part` fits. Parts that the lanes have not reached
    /// yet are evicted only for a part that a lane waits for.
    pub(super) fn make_room(
        &self,
        state: &mut State<S>,
        part: ChunkRange,
        wanted: bool,
        evicted: &mut Vec<(ChunkRange, Arc<S>)>,
    ) -> bool {
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
                if wanted || !self.is_ahead(state, victim, slot) {
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
            self.make_queue(state, &[&victims[..], &held].concat());
            made = true;
        }
        held.into_iter().rev().for_each(|part| state.queue.parts.push_front(part));
        if !self.has_room(state, part, &victims) {
            victims.into_iter().rev().for_each(|victim| state.queue.parts.push_front(victim));
            return false;
        }
        for (victim, _) in victims {
            if let Some(Slot::Here { chunk, .. }) = state.slots.remove(&victim) {
                self.covered().set(victim, false);
                state.registered_bytes -= bytes_of(victim);
                evicted.push((victim, chunk));
            }
        }
        true
    }

    /// Whether a part fits once these are gone.
    fn has_room(&self, state: &State<S>, part: ChunkRange, victims: &[(ChunkRange, u64)]) -> bool {
        let freed_bytes: u64 = victims.iter().map(|&(victim, _)| bytes_of(victim)).sum();
        let bytes = state.registered_bytes - freed_bytes + bytes_of(part);
        let parts = state.slots.len() - victims.len() + 1;
        self.budget_bytes.is_none_or(|budget_bytes| bytes <= budget_bytes) && parts <= self.parts_max
    }

    /// Makes the queue anew, without the parts in `taken`.
    fn make_queue(&self, state: &mut State<S>, taken: &[(ChunkRange, u64)]) {
        let mut parts = Vec::with_capacity(state.slots.len());
        for (&part, slot) in &state.slots {
            if let Slot::Here { last_use, .. } = slot
                && !taken.contains(&(part, *last_use))
            {
                parts.push((self.is_ahead(state, part, slot), *last_use, part));
            }
        }
        parts.sort_unstable_by_key(|&(ahead, last_use, _)| (ahead, last_use));
        let parts = parts.into_iter().map(|(_, last_use, part)| (part, last_use)).collect();
        state.queue = Queue { parts, made_at: state.uses };
    }

    /// Whether a part was planned or registered for this round and the lanes have not reached it yet.
    fn is_ahead(&self, state: &State<S>, part: ChunkRange, slot: &Slot<S>) -> bool {
        let Slot::Here { registered_in, used_in, .. } = slot else { return false };
        // Lanes will not come back in this round to parts that all lanes have passed.
        let passed = state.reached.iter().min().copied().unwrap_or_default();
        let end = (usize::from(part.region), part.first_page + part.pages);
        end > passed
            && *used_in != Some(state.plans)
            && (*registered_in == state.plans || state.dirty.any_in(part))
    }
}

impl<S> State<S> {
    /// Whether no lane holds a part, or waits for it.
    fn may_go(&self, part: ChunkRange, slot: &Slot<S>) -> bool {
        let Slot::Here { chunk, .. } = slot else { return false };
        Arc::strong_count(chunk) == 1 && !self.wanted.iter().any(|&page| contains(part, page))
    }
}

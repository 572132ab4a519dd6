//! What is registered, what lanes wait for, and how far they are in the round.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::coverage::DirtyBlocks;
use super::parts::contains;
use super::queue::Queue;
use crate::transport::rdma::wire::ChunkRange;

/// The parts that are registered or about to be, and what the lanes and the registrar know about the round.
#[derive(Debug)]
pub(super) struct State<S> {
    /// Parts that are registered or about to be.
    pub(super) slots: BTreeMap<ChunkRange, Slot<S>>,
    /// The pages that lanes wait for, by region, one entry a lane, in the order in which the waits began.
    pub(super) wanted: Vec<(usize, u64)>,
    /// Bytes of the parts that are registered or about to be.
    pub(super) registered_bytes: u64,
    /// Counts the uses of parts.
    pub(super) uses: u64,
    /// Counts the plans: one a round.
    pub(super) plans: u64,
    /// The blocks to send by the latest plan, if not all of RAM may be registered.
    pub(super) dirty: DirtyBlocks,
    /// Parts in the order of their eviction.
    pub(super) queue: Queue,
    /// For each lane, the region and page that it has reached in this round, and from which it continues.
    pub(super) reached: Vec<(usize, u64)>,
    /// The lanes of the round have finished.
    pub(super) over: bool,
    /// The registrar has failed.
    pub(super) failed: bool,
}

/// The state of a part that is not absent.
#[derive(Debug)]
pub(super) enum Slot<S> {
    /// Being registered.
    Coming,
    Here {
        chunk: Arc<S>,
        last_use: u64,
        /// The latest plan when it was registered.
        registered_in: u64,
        /// The latest plan when a lane used it.
        used_in: Option<u64>,
    },
}

impl<S> State<S> {
    /// For this many lanes, before the first round.
    pub(super) fn new(lanes: usize) -> Self {
        Self {
            slots: BTreeMap::new(),
            wanted: Vec::new(),
            registered_bytes: 0,
            uses: 0,
            plans: 0,
            dirty: DirtyBlocks::default(),
            queue: Queue::default(),
            reached: vec![(0, 0); lanes],
            over: false,
            failed: false,
        }
    }

    pub(super) fn reach(&mut self, lane: usize, place: (usize, u64)) {
        if let Some(reached) = self.reached.get_mut(lane) {
            *reached = place;
        }
    }

    /// The part that contains a page and is not absent.
    pub(super) fn part_of(&self, (region, page): (usize, u64)) -> Option<ChunkRange> {
        let region = u16::try_from(region).ok()?;
        let last = ChunkRange { region, first_page: page, pages: u64::MAX };
        let (&part, _) = self.slots.range(..=last).next_back()?;
        contains(part, (region.into(), page)).then_some(part)
    }

    /// The parts of a chunk that are not absent, in order.
    pub(super) fn parts_of(&self, chunk: ChunkRange) -> impl Iterator<Item = ChunkRange> {
        let end = ChunkRange { first_page: chunk.first_page + chunk.pages, pages: 0, ..chunk };
        self.slots.range(ChunkRange { pages: 0, ..chunk }..end).map(|(&part, _)| part)
    }

    pub(super) fn acquire(&mut self, page: (usize, u64)) -> Option<(ChunkRange, Arc<S>)> {
        self.uses += 1;
        let (uses, plans) = (self.uses, self.plans);
        let part = self.part_of(page)?;
        match self.slots.get_mut(&part)? {
            Slot::Here { chunk, last_use, used_in, .. } => {
                (*last_use, *used_in) = (uses, Some(plans));
                Some((part, chunk.clone()))
            }
            Slot::Coming => None,
        }
    }

    /// Whether no page of a part is in another.
    pub(super) fn is_free(&self, part: ChunkRange) -> bool {
        let last_page = part.first_page + part.pages - 1;
        let last = ChunkRange { first_page: last_page, pages: u64::MAX, ..part };
        let before = self.slots.range(..=last).next_back();
        before.is_none_or(|(before, _)| {
            before.region != part.region || before.first_page + before.pages <= part.first_page
        })
    }
}

//! What the registrar has yet to register in a round.

use std::collections::VecDeque;

use super::coverage::BLOCK_PAGES;
use super::parts::cut;
use super::slicing::Slicing;
use super::{FindBlocks, State, contains};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Slices of which something is to be registered, in the order in which lanes come to them. A slice is looked
/// at, and cut, when its turn comes.
#[derive(Debug)]
pub(in crate::transport::rdma) struct Planned {
    slices: VecDeque<SliceRange>,
    /// Parts of slices that were cut, which come first.
    parts: VecDeque<SliceRange>,
}

impl Planned {
    pub(super) fn new(slices: VecDeque<SliceRange>) -> Self {
        Self { slices, parts: VecDeque::new() }
    }

    /// The next part, in order.
    pub(super) fn next<S>(
        &mut self,
        state: &State<S>,
        find: &mut FindBlocks<'_>,
    ) -> Result<Option<SliceRange>, TransportError> {
        loop {
            while let Some(part) = self.parts.pop_front() {
                if state.is_free(part) {
                    return Ok(Some(part));
                }
            }
            let Some(slice) = self.slices.pop_front() else { return Ok(None) };
            let registered: Vec<_> = state.parts_of(slice).collect();
            self.parts = cut(slice, &registered, find(slice)?).into();
        }
    }

    /// The part to register for a page that a lane waits for and that is in none. What else its slice needs
    /// comes next.
    pub(super) fn take<S>(
        &mut self,
        page: (usize, u64),
        slicing: &Slicing,
        state: &State<S>,
        find: &mut FindBlocks<'_>,
    ) -> Result<Option<SliceRange>, TransportError> {
        let has_page = |&part: &SliceRange| contains(part, page) && state.is_free(part);
        if let Some(index) = self.parts.iter().position(has_page) {
            return Ok(self.parts.remove(index));
        }
        let Some(slice) = slicing.range_of(page.0, page.1) else { return Ok(None) };
        let registered: Vec<_> = state.parts_of(slice).collect();
        let mut needed = find(slice)?;
        // Whether it has data or not.
        let block = page.1 / BLOCK_PAGES;
        needed.push(block..block + 1);
        needed.sort_unstable_by_key(|blocks| blocks.start);
        let mut wanted = None;
        for part in cut(slice, &registered, needed).into_iter().rev() {
            if contains(part, page) {
                wanted = Some(part);
            } else {
                self.parts.push_front(part);
            }
        }
        Ok(wanted)
    }

    /// There was no room for this part.
    pub(super) fn put_back(&mut self, part: SliceRange) {
        self.parts.push_front(part);
    }
}

impl<S> State<S> {
    /// Whether no page of a part is in another.
    fn is_free(&self, part: SliceRange) -> bool {
        let last_page = part.first_page + part.pages - 1;
        let last = SliceRange { first_page: last_page, pages: u64::MAX, ..part };
        let before = self.slots.range(..=last).next_back();
        before.is_none_or(|(before, _)| {
            before.region != part.region || before.first_page + before.pages <= part.first_page
        })
    }
}

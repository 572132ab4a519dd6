//! The journal: pages of guest RAM that only the VMM writes.
//!
//! With every beat of vCPU 0 the VMM writes one word, in turn over the whole journal. KVM's dirty log does
//! not list these writes; only the VMM's own bitmap does. The guest checks the whole journal, so a copy of
//! its memory made without that bitmap stays detectable for one round of the journal: 16,384 beats, half a
//! minute or more.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::guest::layout::JOURNAL;
use crate::guest::pattern::{PAGE_FACTOR, PAGE_WORDS, PageContent, WORD_STEP};
use crate::ram::{GuestRam, PAGE_BYTES};

pub(crate) const PAGES: u64 = 32;
pub(crate) const WORDS: u64 = PAGES * PAGE_WORDS as u64;

/// Writes the word of this beat.
pub(crate) fn write(memory: &GuestRam, beat: u64) -> Result<(), GuestMemoryError> {
    memory.store(word(beat), GuestAddress(JOURNAL + beat % WORDS * 8), Ordering::Release)
}

/// Whether page `index` of the journal has the right content after `beats` beats.
pub(crate) fn is_right(content: &PageContent, index: u64, beats: u64) -> bool {
    content.iter().zip(index * PAGE_WORDS as u64..).all(|(&found, position)| {
        let age = beats.wrapping_sub(position) % WORDS;
        found == word(beats.saturating_sub(age))
    })
}

/// The page number of page `index` of the journal.
pub(crate) fn page_number(index: u64) -> u64 {
    JOURNAL / PAGE_BYTES + index
}

/// The word of a beat; beats count from 1, and 0 is RAM not yet written.
fn word(beat: u64) -> u64 {
    if beat == 0 { 0 } else { beat.wrapping_mul(PAGE_FACTOR).wrapping_add(WORD_STEP) }
}

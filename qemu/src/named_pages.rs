//! The pages that a stream named and that were not taken yet.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use sterna_bitmap::{PAGE_BYTES, SoftwareBitmap};
use vm_memory::bitmap::{Bitmap, NewBitmap};

use crate::names::{Content, PageNames, SharedBlock};

/// The named pages of all shared blocks.
///
/// A page is first named as zero if the guest never wrote it: the destination's memory is fresh and holds
/// zeros already, so the page need not be sent. If it was ever named with bytes, it must be: the destination
/// may have those.
#[derive(Debug)]
pub struct NamedPages {
    blocks: Vec<Block>,
    /// How many pages are marked and not taken; a page that is marked twice may count twice.
    marked: AtomicU64,
    /// How many were taken.
    taken: AtomicU64,
}

#[derive(Debug)]
struct Block {
    marks: SoftwareBitmap,
    /// The pages that were ever named with bytes.
    written: Written,
}

impl NamedPages {
    /// For these blocks, no page of which was named.
    #[must_use]
    pub fn new(blocks: &[SharedBlock]) -> Self {
        let block = |block: &SharedBlock| {
            let len = usize::try_from(block.len_bytes).unwrap_or(usize::MAX);
            Block { marks: SoftwareBitmap::with_len(len), written: Written::new(len.div_ceil(PAGE_BYTES)) }
        };
        Self {
            blocks: blocks.iter().map(block).collect(),
            marked: AtomicU64::new(0),
            taken: AtomicU64::new(0),
        }
    }

    /// Takes the named pages of a part of a block, in words of 64 pages: calls `taken` with the index and the
    /// bits of each word that is not empty. The range begins at a multiple of 64 words.
    pub fn take(&self, block: usize, words: Range<usize>, mut taken: impl FnMut(usize, u64)) {
        let mut pages = 0;
        self.blocks[block].marks.take_words(words, |word, bits| {
            pages += u64::from(bits.count_ones());
            taken(word, bits);
        });
        self.taken.fetch_add(pages, Ordering::Relaxed);
        let less = |marked: u64| Some(marked.saturating_sub(pages));
        // Another thread marks meanwhile; the closure never refuses.
        let _ = self.marked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How many pages were named, one that was named again after it was taken as often.
    #[must_use]
    pub fn count_named(&self) -> u64 {
        self.taken.load(Ordering::Relaxed) + self.marked.load(Ordering::Relaxed)
    }

    /// How many bytes of pages are named and not taken.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.marked.load(Ordering::Relaxed).saturating_mul(PAGE_BYTES as u64)
    }
}

impl PageNames for NamedPages {
    fn named(&self, block: usize, page: u64, content: Content) {
        let Some(Block { marks, written }) = self.blocks.get(block) else { return };
        let Ok(page) = usize::try_from(page) else { return };
        match content {
            Content::Bytes => written.insert(page),
            Content::Zero if !written.contains(page) => return,
            Content::Zero => {}
        }
        let offset = page.saturating_mul(PAGE_BYTES);
        if !marks.dirty_at(offset) {
            self.marked.fetch_add(1, Ordering::Relaxed);
        }
        // Even if it was marked: a taker may have just taken that mark.
        marks.mark_dirty(offset, 1);
    }
}

/// A set of pages that only grows.
#[derive(Debug)]
struct Written(Box<[AtomicU64]>);

impl Written {
    fn new(pages: usize) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn insert(&self, page: usize) {
        if let Some(word) = self.0.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    fn contains(&self, page: usize) -> bool {
        self.0.get(page / 64).is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 1;

    fn named(names: &[(u64, Content)]) -> (NamedPages, Vec<u64>) {
        let block = |len_bytes| SharedBlock { name: String::new(), len_bytes };
        let pages = NamedPages::new(&[block(4096), block(5000 * 4096)]);
        names.iter().for_each(|&(page, content)| pages.named(BLOCK, page, content));
        let taken = take(&pages);
        (pages, taken)
    }

    fn take(pages: &NamedPages) -> Vec<u64> {
        let mut taken = Vec::new();
        pages.take(BLOCK, 0..usize::MAX, |word, bits| {
            taken.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit));
        });
        taken
    }

    #[test]
    fn a_page_that_was_always_zero_is_left_out_and_one_that_became_zero_is_not() {
        let names = [(3, Content::Zero), (4, Content::Bytes), (4999, Content::Bytes), (4999, Content::Zero)];
        let (pages, taken) = named(&names);
        assert_eq!(taken, [4, 4999]);
        assert!(take(&pages).is_empty());
        pages.named(BLOCK, 4, Content::Zero);
        pages.named(BLOCK, 5, Content::Zero);
        assert_eq!(take(&pages), [4]);
    }

    #[test]
    fn named_bytes_are_counted_until_they_are_taken() {
        let (pages, _) = named(&[]);
        [7, 7, 8, 4096].iter().for_each(|&page| pages.named(BLOCK, page, Content::Bytes));
        assert_eq!(pages.marked_bytes(), 3 * 4096);
        take(&pages);
        assert_eq!(pages.marked_bytes(), 0);
        pages.named(BLOCK, 7, Content::Bytes);
        assert_eq!(pages.count_named(), 4);
    }

    #[test]
    fn a_name_outside_of_the_blocks_marks_nothing() {
        let (pages, taken) = named(&[(5000, Content::Bytes), (u64::MAX, Content::Bytes)]);
        pages.named(2, 0, Content::Bytes);
        assert!(taken.is_empty());
        assert!(take(&pages).is_empty());
    }
}

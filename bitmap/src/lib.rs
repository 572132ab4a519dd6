//! Which pages of guest RAM a VMM and its device threads wrote: a bitmap for [`vm-memory`](vm_memory).
//!
//! To empty `vm-memory`'s own `AtomicBitmap`, a caller must allocate a second bitmap and exchange every word.
//! A live migration empties it every round, and nearly all words are zero. This bitmap has a *summary* with a
//! bit for each word, so [`take`](SoftwareBitmap::take) reads one summary word for every 16 MiB of RAM and
//! the words that were written, and allocates nothing.
//!
//! Marking and taking go on at the same time. A write that was marked before the call of `take` is reported
//! by that call or by an earlier one, never lost. A taker that receives a page sees every write that preceded
//! its mark. The unit tests have [loom](https://docs.rs/loom) try all the interleavings: `cargo test -p
//! sterna-bitmap`.

mod marks;

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use marks::Marks;

/// The size of a tracked page in bytes: the unit of KVM's dirty log on x86-64.
pub const PAGE_BYTES: usize = 4096;

/// One bit for each page of a region, set by each write to the region through `vm-memory`.
#[derive(Debug, Default)]
pub struct SoftwareBitmap {
    marks: Marks<AtomicU64>,
    pages: usize,
}

impl SoftwareBitmap {
    /// Empties the bitmap and calls `taken` with the index and the bits of each word that is not zero. Bit 0
    /// of word 0 is the region's first page.
    pub fn take(&self, taken: impl FnMut(usize, u64)) {
        self.marks.take(taken);
    }

    /// Like [`take`](Self::take) for a range of words, so that several takers can share the bitmap. The range
    /// must start at a multiple of 64; its end is rounded up to one.
    pub fn take_words(&self, words: Range<usize>, taken: impl FnMut(usize, u64)) {
        self.marks.take_words(words, taken);
    }

    /// How many pages are marked, about: others are marked or taken meanwhile.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.marks.count()
    }

    /// Clears all marks.
    pub fn reset(&self) {
        self.take(|_, _| {});
    }
}

impl NewBitmap for SoftwareBitmap {
    fn with_len(len_bytes: usize) -> Self {
        let pages = len_bytes.div_ceil(PAGE_BYTES);
        Self { marks: Marks::new(pages.div_ceil(64)), pages }
    }
}

impl Bitmap for SoftwareBitmap {
    fn mark_dirty(&self, offset: usize, len_bytes: usize) {
        // Pages past the region's end are ignored, as `AtomicBitmap` does.
        let first = offset / PAGE_BYTES;
        let end = offset.saturating_add(len_bytes).div_ceil(PAGE_BYTES).min(self.pages);
        if len_bytes == 0 || first >= end {
            return;
        }
        for word in first / 64..end.div_ceil(64) {
            let from = first.saturating_sub(word * 64);
            let to = (end - word * 64).min(64);
            self.marks.mark(word, u64::MAX << from & u64::MAX >> (64 - to));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        page < self.pages && self.marks.word(page / 64) >> (page % 64) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<'bitmap> WithBitmapSlice<'bitmap> for SoftwareBitmap {
    type S = RefSlice<'bitmap, Self>;
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    fn taken(bitmap: &SoftwareBitmap, words: usize) -> Vec<u64> {
        let mut bits = vec![0; words];
        bitmap.take(|word, taken| {
            assert_ne!(taken, 0);
            bits[word] |= taken;
        });
        bits
    }

    #[test]
    fn it_marks_what_an_atomic_bitmap_marks_and_gives_each_mark_out_once() {
        // More than the 4,096 pages of one summary word, and no whole number of words.
        const LEN_BYTES: usize = 5000 * PAGE_BYTES + 1;
        let (ours, theirs) = (SoftwareBitmap::with_len(LEN_BYTES), AtomicBitmap::with_len(LEN_BYTES));
        let ranges = [
            (0, 1),
            (PAGE_BYTES - 1, 2),
            (63 * PAGE_BYTES, PAGE_BYTES + 1),
            (64 * PAGE_BYTES, 64 * PAGE_BYTES),
            (100 * PAGE_BYTES, 300 * PAGE_BYTES),
            (4096 * PAGE_BYTES - 1, 1),
            (5000 * PAGE_BYTES, 1),
            (4999 * PAGE_BYTES, 1 << 30),
            (5001 * PAGE_BYTES, 1),
            (usize::MAX, usize::MAX),
            (7 * PAGE_BYTES, 0),
        ];
        for (offset, len_bytes) in ranges {
            ours.mark_dirty(offset, len_bytes);
            theirs.mark_dirty(offset, len_bytes);
            for page in 0..5002 {
                assert_eq!(ours.dirty_at(page * PAGE_BYTES), theirs.dirty_at(page * PAGE_BYTES), "{page}");
            }
            let theirs = theirs.get_and_reset();
            assert_eq!(taken(&ours, theirs.len()), theirs, "{len_bytes} bytes at {offset}");
            assert_eq!(taken(&ours, theirs.len()), vec![0; theirs.len()]);
        }
    }

    #[test]
    fn parts_are_taken_by_themselves_and_together_are_all() {
        let bitmap = SoftwareBitmap::with_len(300 * 64 * PAGE_BYTES);
        let marked = [0, 63, 64, 127, 128, 255, 256, 299];
        let mark = || marked.iter().for_each(|word| bitmap.mark_dirty(word * 64 * PAGE_BYTES, 1));
        let take = |words| {
            let mut found = Vec::new();
            bitmap.take_words(words, |word, bits| found.push((word, bits)));
            found.into_iter().map(|(word, bits)| (word, bits.count_ones())).collect::<Vec<_>>()
        };
        mark();
        assert_eq!((bitmap.count(), bitmap.count()), (8, 8), "to count takes nothing");
        assert_eq!(take(64..128), [(64, 1), (127, 1)]);
        assert_eq!(bitmap.count(), 6);
        assert_eq!(take(64..128), []);
        assert_eq!(take(0..64), [(0, 1), (63, 1)]);
        assert_eq!(take(128..1000), [(128, 1), (255, 1), (256, 1), (299, 1)]);
        mark();
        assert_eq!(take(0..300).len(), marked.len());
        assert_eq!(take(640..1000), []);
    }

    #[test]
    fn writes_through_guest_memory_and_its_slices_are_marked() {
        let memory: GuestMemoryMmap<SoftwareBitmap> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 100 * PAGE_BYTES)]).unwrap();
        memory.write_obj(1u64, GuestAddress(70 * PAGE_BYTES as u64 - 4)).unwrap();
        memory.get_slice(GuestAddress(8 * PAGE_BYTES as u64), PAGE_BYTES).unwrap().copy_from(&[1u8; 8]);
        let region = memory.iter().next().unwrap();
        assert_eq!(taken((**region).bitmap(), 2), [1 << 8, 0b11 << 5]);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        (**region).bitmap().reset();
        assert_eq!(taken((**region).bitmap(), 2), [0, 0]);
    }
}

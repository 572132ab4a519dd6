//! The scan for dirty runs, as a lane's worker makes it, and plainer scans beside it.

use std::hint::black_box;
use std::num::NonZeroUsize;

use sterna::dirty::{DirtyBitmap, Stripes};
use sterna::memory::{PAGE_BYTES, PAGE_LEN, RunEdges, Runs};
use vm_memory::bitmap::AtomicBitmap;

/// The scan that the worker of a lane makes of the bitmap in a round.
#[must_use]
pub fn scan(stripes: &Stripes, lane: usize, bitmap: &DirtyBitmap) -> u64 {
    let (mut sum, mut edges) = (0, RunEdges::default());
    for stripe in stripes.of_lane(lane, black_box(bitmap)) {
        sum = stripe.runs(&mut edges).fold(sum, taken);
    }
    sum
}

/// The same runs, found word by word, over the whole bitmap.
#[must_use]
pub fn word_by_word(words: &[u64]) -> u64 {
    Runs::new(words).fold(0, taken)
}

/// The same runs, found by testing each page.
#[must_use]
pub fn bit_by_bit(words: &[u64]) -> u64 {
    let (mut sum, mut first, mut count) = (0, 0, 0);
    for (index, word) in (0..).zip(words) {
        for bit in 0..64 {
            if word >> bit & 1 == 0 {
                if count > 0 {
                    sum = taken(sum, (first, count));
                }
                count = 0;
            } else {
                if count == 0 {
                    first = index * 64 + bit;
                }
                count += 1;
            }
        }
    }
    if count > 0 { taken(sum, (first, count)) } else { sum }
}

/// Both numbers of a run are used, so that neither is optimised away.
fn taken(sum: u64, (first, count): (u64, u64)) -> u64 {
    sum.wrapping_add(first ^ count)
}

/// A clean bitmap of `vm-memory`'s, for as many pages as so many words have bits.
#[must_use]
pub fn clean_atomic(words: usize) -> AtomicBitmap {
    let page = NonZeroUsize::new(PAGE_LEN).expect("a page has bytes");
    AtomicBitmap::new(words * 64 * PAGE_LEN, page)
}

/// Marks the pages that are set in `words`.
pub fn mark_atomic(bitmap: &AtomicBitmap, words: &[u64]) {
    let bytes = |pages: u64| usize::try_from(pages * PAGE_BYTES).expect("it fits a 64-bit machine");
    for (first, count) in Runs::new(words) {
        bitmap.set_addr_range(bytes(first), bytes(count));
    }
}

//! Prefetching the words of a bitmap into the cache.
#![expect(unsafe_code, reason = "the processor's prefetch instruction has no safe name in stable Rust")]

use super::stripe::STRIPE_WORDS;

/// Words in a cache line.
const LINE_WORDS: usize = 8;

/// Has the processor fetch these words, without waiting for them.
pub(super) fn prefetch(words: &[u64]) {
    for line in words.chunks(LINE_WORDS) {
        prefetch_line(&line[0]);
    }
}

/// The same for those lines of a whole stripe that have a word set in `nonzero`, which is not zero.
pub(super) fn prefetch_nonzero(words: &[u64], nonzero: u64) {
    let Some(words) = words.first_chunk::<STRIPE_WORDS>() else { return };
    for line in lines_of(nonzero) {
        prefetch_line(&words[usize::from(line % 8) * LINE_WORDS]);
    }
}

/// The lines that are not zero, each in its place among eight; the other places have the first such line.
///
/// Always eight: the processor can predict neither their number nor which they are, and a mispredicted branch
/// takes longer than eight prefetches.
fn lines_of(nonzero: u64) -> [u8; 8] {
    const ONES: u64 = u64::MAX / 255;
    const LOW: u64 = 127 * ONES;
    // The highest bit of each byte that is not zero, then all its bits: adding 127 to what is not zero
    // reaches the highest.
    let highest = (((nonzero & LOW) + LOW) | nonzero) & !LOW;
    let some = highest << 1;
    let some = some.wrapping_sub(highest >> 7);
    let first = u64::from(nonzero.trailing_zeros() / 8);
    (u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7]) & some | (first * ONES) & !some).to_le_bytes()
}

#[cfg(target_arch = "x86_64")]
fn prefetch_line(word: &u64) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch changes nothing that a program can see, and faults at no address; this address is
    // that of a live reference.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast()) };
}

/// On other architectures a load does it, which may stall the processor.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch_line(word: &u64) {
    std::hint::black_box(*word);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_lines_are_those_with_something_in_them_and_no_others(bytes: [u8; 8], clear: u8) {
            let mut bytes = bytes;
            (0..8).filter(|line| clear >> line & 1 == 1).for_each(|line| bytes[line] = 0);
            prop_assume!(bytes != [0; 8]);
            let expected: Vec<u8> = (0..8).filter(|&line| bytes[usize::from(line)] != 0).collect();
            let mut found = lines_of(u64::from_le_bytes(bytes)).to_vec();
            found.sort_unstable();
            found.dedup();
            prop_assert_eq!(found, expected);
        }
    }
}

//! Words of a bitmap on their way into the cache before they are wanted.
#![expect(unsafe_code, reason = "the processor's prefetch instruction has no safe name in stable Rust")]

/// Words in a line of the cache.
const LINE_WORDS: usize = 8;

/// Has the processor fetch these words, and does not wait for them.
pub(super) fn prefetch(words: &[u64]) {
    for line in words.chunks(LINE_WORDS) {
        prefetch_line(&line[0]);
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch_line(word: &u64) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch changes nothing that a program can see, and faults at no address; this one is that of a live reference.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast()) };
}

/// Elsewhere a load does it, for which the processor may come to wait.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch_line(word: &u64) {
    std::hint::black_box(*word);
}

//! The zero test of the first round, beside reading the same amount of memory.

use std::hint::black_box;

use criterion::Criterion;
use sterna::memory::{GuestSlice, PAGE_LEN};
use sterna_bench::ram::{run, touched};
use sterna_bench::{Stage, all_sizes, criterion, measuring, plain_read};

/// The bytes that memory delivers for one word.
const LINE_LEN: usize = 64;

/// Words in a page.
const PAGE_WORDS: usize = PAGE_LEN / 8;

fn main() {
    let mut criterion = criterion();
    for mib in sizes() {
        zero_pages(&mut criterion, mib);
        other_pages(&mut criterion, mib);
    }
    criterion.final_summary();
}

/// By default only a size that fits no cache, as guest RAM; `STERNA_BENCH_ALL=1` adds sizes that fit the
/// caches.
fn sizes() -> Vec<usize> {
    match (measuring(), all_sizes()) {
        (false, _) => vec![1],
        (_, false) => vec![512],
        (_, true) => vec![1, 16, 512],
    }
}

/// The test must read every byte of a zero page.
fn zero_pages(criterion: &mut Criterion, mib: usize) {
    let bytes = mib << 20;
    let plain = vec![u64::MAX; bytes / 8];
    let name = format!("zero test, {mib} MiB of zero pages");
    let mut stage = Stage::new(criterion, name, bytes, "plain read", || plain_read(&plain));
    test_pages(&mut stage, bytes, 0);
}

/// The test reads one cache line of a page that begins with another value: the limit reads a word of each
/// page.
fn other_pages(criterion: &mut Criterion, mib: usize) {
    let bytes = mib << 20;
    let plain = vec![u64::MAX; bytes / 8];
    let name = format!("zero test, {mib} MiB of pages whose first word is set");
    let first_words = || {
        let (pages, _) = black_box(&plain).as_chunks::<PAGE_WORDS>();
        pages.iter().filter(|page| page[0] != 0).count() as u64
    };
    let lines_bytes = bytes / PAGE_LEN * LINE_LEN;
    let mut stage = Stage::new(criterion, name, lines_bytes, "plain read of a word a page", first_words);
    test_pages(&mut stage, bytes, 1);
}

/// The first round's test of a run.
fn test_pages(stage: &mut Stage<'_>, bytes: usize, word: u64) {
    let ram = touched(bytes, word);
    let slice = ram.slice(run(0, (bytes / PAGE_LEN) as u64)).expect("the run is in RAM");
    stage.beside("is_zero, page by page", || slice.pages().filter(GuestSlice::is_zero).count() as u64);
}

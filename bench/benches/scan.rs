//! From dirty bitmap to page runs, beside reading the same words.

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::Criterion;
use sterna::dirty::{DirtyBitmap, SoftwareBitmap, SoftwareLog, Stripes};
use sterna::memory::{PAGE_BYTES, PAGE_LEN, RunEdges, Runs};
use sterna_bench::dirty::Pattern;
use sterna_bench::{Stage, all_sizes, criterion, measuring, plain_read, ram};
use vm_memory::bitmap::AtomicBitmap;

const GIB: u64 = 1 << 30;

/// Above this size the loops over single bits take seconds.
const BIT_BY_BIT_MAX: u64 = 64 * GIB;

fn main() {
    let mut criterion = criterion();
    for ram_bytes in sizes() {
        for pattern in patterns() {
            scan(&mut criterion, ram_bytes, pattern);
        }
    }
    software_log(&mut criterion);
    criterion.final_summary();
}

/// By default a bitmap of 2 MiB, which fits a cache, and one of 128 MiB, which does not.
fn sizes() -> Vec<u64> {
    match (measuring(), all_sizes()) {
        (false, _) => vec![GIB],
        (_, false) => vec![64 * GIB, 4096 * GIB],
        (_, true) => vec![GIB, 16 * GIB, 64 * GIB, 256 * GIB, 1024 * GIB, 4096 * GIB],
    }
}

fn patterns() -> Vec<Pattern> {
    use Pattern as P;
    let mut patterns =
        vec![P::random(0), P::random(1), P::random(10), P::clustered(100), P::random(500), P::random(1000)];
    if all_sizes() {
        patterns.extend([P::clustered(1), P::clustered(10), P::random(100), P::clustered(500)]);
    }
    patterns
}

fn scan(criterion: &mut Criterion, ram_bytes: u64, pattern: Pattern) {
    let bitmap = pattern.bitmap(ram_bytes);
    let words = bitmap.regions()[0].words();
    let (all, eighth) = (Stripes::new(1), Stripes::new(8));

    let name = format!("scan, {} GiB, {pattern}", ram_bytes / GIB);
    let mut stage = Stage::new(criterion, name, size_of_val(words), "plain read", || plain_read(words));
    stage.beside("stripes to runs", || lane(&all, black_box(&bitmap)));
    stage.beside("stripes to runs, a lane of 8", || lane(&eighth, black_box(&bitmap)));
    if ram_bytes > BIT_BY_BIT_MAX {
        return;
    }
    stage.beside("bit by bit", || bit_by_bit(black_box(words)));
    let atomic = atomic(words);
    stage.beside_prepared(
        "get_and_reset, bit by bit",
        || atomic.clone(),
        |atomic| bit_by_bit(&atomic.get_and_reset()),
    );
    stage.beside_prepared(
        "get_and_reset, to runs",
        || atomic.clone(),
        |atomic| Runs::new(&atomic.get_and_reset()).fold(0, taken),
    );
}

/// The scan that the worker of the first lane makes of the bitmap in a round.
fn lane(stripes: &Stripes, bitmap: &DirtyBitmap) -> u64 {
    let (mut sum, mut edges) = (0, RunEdges::default());
    for stripe in stripes.of_lane(0, bitmap) {
        sum = stripe.runs(&mut edges).fold(sum, taken);
    }
    sum
}

/// The same runs, found by testing each page.
fn bit_by_bit(words: &[u64]) -> u64 {
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

fn atomic(words: &[u64]) -> AtomicBitmap {
    let page = NonZeroUsize::new(PAGE_LEN).expect("a page has bytes");
    let bitmap = AtomicBitmap::new(words.len() * 64 * PAGE_LEN, page);
    for (first, count) in Runs::new(words) {
        let bytes = |pages: u64| usize::try_from(pages * PAGE_BYTES).expect("it fits a 64-bit machine");
        bitmap.set_addr_range(bytes(first), bytes(count));
    }
    bitmap
}

/// The cost that every harvest pays for the VMM's own writes when the VMM wrote nothing.
fn software_log(criterion: &mut Criterion) {
    let ram_bytes = if measuring() { 64 * GIB } else { GIB };
    let memory = ram::untouched::<SoftwareBitmap>(usize::try_from(ram_bytes).expect("a 64-bit machine"));
    let log = SoftwareLog::new(&memory);
    let mut bits = Pattern::random(0).bitmap(ram_bytes);
    let limit = Pattern::random(0).bitmap(ram_bytes);
    let words = limit.regions()[0].words();

    let name = format!("software log, {} GiB, 0 %", ram_bytes / GIB);
    Stage::new(criterion, name, size_of_val(words), "plain read", || plain_read(words))
        .beside("harvest", || bits.harvest(&log).expect("the region is there"));
}

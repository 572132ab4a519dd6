//! From dirty bitmap to page runs, beside reading the same words.

use std::hint::black_box;

use criterion::Criterion;
use sterna::dirty::{SoftwareBitmap, SoftwareLog, Stripes};
use sterna_bench::dirty::Pattern;
use sterna_bench::reference::{self, bit_by_bit, clean_atomic, mark_atomic, word_by_word};
use sterna_bench::{Stage, all_sizes, criterion, measuring, plain_read, ram};

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
    stage.beside("stripes to runs", || reference::scan(&all, 0, &bitmap));
    stage.beside("stripes to runs, a lane of 8", || reference::scan(&eighth, 0, &bitmap));
    if ram_bytes > BIT_BY_BIT_MAX {
        return;
    }
    stage.beside("bit by bit", || bit_by_bit(black_box(words)));
    let atomic = clean_atomic(words.len());
    mark_atomic(&atomic, words);
    stage.beside_prepared(
        "get_and_reset, bit by bit",
        || atomic.clone(),
        |atomic| bit_by_bit(&atomic.get_and_reset()),
    );
    stage.beside_prepared(
        "get_and_reset, to runs",
        || atomic.clone(),
        |atomic| word_by_word(&atomic.get_and_reset()),
    );
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

//! The cost of each stage of a migration, beside its limit.
//!
//! A benchmark is a [`Stage`]. Its limit is the plainest routine that touches the same bytes; beside it run
//! the engine's routine and the alternatives. Each stage ends with a table of their speeds as shares of the
//! limit's. This library holds the parts that the benchmarks share: the stage, generated [dirty
//! bitmaps](dirty) and [RAM](ram), the [scans](mod@reference) for dirty runs, and
//! [`plain_read`]. Benchmarks that take whole migrations, or print a table of their own, are in the program
//! `sterna-bench`.

pub mod dirty;
pub mod ram;
pub mod reference;
mod stage;

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
pub use stage::Stage;

/// Criterion with times short enough that all benchmarks end within minutes. Its command line overrides them.
#[must_use]
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// Whether this run measures. The single pass of `cargo test --benches` does not: it checks only that a
/// benchmark runs, and skips the large sizes.
#[must_use]
pub fn measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Whether `STERNA_BENCH_ALL=1` asks for all sizes.
#[must_use]
pub fn all_sizes() -> bool {
    measuring() && std::env::var_os("STERNA_BENCH_ALL").is_some_and(|value| value == "1")
}

/// Reads all words and does next to nothing with them: the limit of any routine that reads each word.
#[must_use]
pub fn plain_read(words: &[u64]) -> u64 {
    // Otherwise the compiler may see that every pass has the same result, and run only one.
    let words = black_box(words);
    // Eight sums that do not wait for each other: a single sum is slower than a cache.
    let (lines, rest) = words.as_chunks::<8>();
    let mut bits = [0; 8];
    for line in lines {
        for (bits, word) in bits.iter_mut().zip(line) {
            *bits |= word;
        }
    }
    bits.iter().chain(rest).fold(0, |bits, word| bits | word)
}

//! What each stage of a migration costs, beside its limit.
//!
//! A benchmark here is a [`Stage`]: the plainest thing that touches the same bytes, which is the limit, and next to it what
//! the engine does and what it is held against. Each stage ends with a table of their speeds as shares of the limit's. This
//! library has what the benchmarks share: the stage, [dirty bitmaps](dirty) and [RAM](ram) made up for them, and
//! [`plain_read`]. What takes whole migrations, or a table of its own, is the program `sterna-bench`.

pub mod dirty;
pub mod ram;
mod stage;

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
pub use stage::Stage;

/// Criterion with times short enough that all of the benchmarks end within minutes. Its command line overrules them.
#[must_use]
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// Whether this is a measurement, and not the single pass of `cargo test --benches`, which only asks whether a benchmark
/// runs and is spared the large sizes.
#[must_use]
pub fn measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Whether all sizes were asked for, by `STERNA_BENCH_ALL=1`.
#[must_use]
pub fn all_sizes() -> bool {
    measuring() && std::env::var_os("STERNA_BENCH_ALL").is_some_and(|value| value == "1")
}

/// Reads all of the words and does next to nothing with them: the limit of whatever has to look at each.
#[must_use]
pub fn plain_read(words: &[u64]) -> u64 {
    // Else the compiler may see that every pass has the same result, and do one.
    let words = black_box(words);
    // Eight sums that do not wait for each other: one is not as fast as a cache can be read.
    let (lines, rest) = words.as_chunks::<8>();
    let mut bits = [0; 8];
    for line in lines {
        for (bits, word) in bits.iter_mut().zip(line) {
            *bits |= word;
        }
    }
    bits.iter().chain(rest).fold(0, |bits, word| bits | word)
}

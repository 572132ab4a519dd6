//! The zero test of the first round, beside a plain read of as much memory.

use std::hint::black_box;
use std::time::Instant;

use sterna::memory::{GuestSlice, PAGE_LEN};
use sterna_bench::plain_read;
use sterna_bench::ram::{run, touched};

/// The speeds of both in MB/s: the fastest of a few passes each, in turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZeroTest {
    pub(crate) read: f64,
    pub(crate) zero_test: f64,
}

/// Larger than caches.
const BYTES: usize = 256 << 20;

const PASSES: usize = 8;

pub(crate) fn zero_test() -> ZeroTest {
    let plain = vec![u64::MAX; BYTES / 8];
    let ram = touched(BYTES, 0);
    let slice = ram.slice(run(0, (BYTES / PAGE_LEN) as u64)).expect("the run is in RAM");
    let mut fastest = ZeroTest { read: 0.0, zero_test: 0.0 };
    for _ in 0..PASSES {
        fastest.read = fastest.read.max(speed(|| plain_read(&plain)));
        let test = || slice.pages().filter(GuestSlice::is_zero).count() as u64;
        fastest.zero_test = fastest.zero_test.max(speed(test));
    }
    fastest
}

fn speed(routine: impl FnOnce() -> u64) -> f64 {
    let began = Instant::now();
    black_box(routine());
    BYTES as f64 / 1e6 / began.elapsed().as_secs_f64()
}

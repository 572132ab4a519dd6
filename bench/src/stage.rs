use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{Bencher, BenchmarkGroup, Criterion, Throughput};

/// A shorter sample measures the clock rather than the routine.
const SAMPLE_MIN: Duration = Duration::from_micros(50);

/// A limit, and the routines measured beside it in the same run.
///
/// Criterion reports every routine as usual. When the stage is dropped, it adds the ratios: the speed of each
/// routine as a share of the limit's, between their fastest samples. Other load on the machine can only make
/// a sample slower.
pub struct Stage<'criterion> {
    name: String,
    group: BenchmarkGroup<'criterion, WallTime>,
    /// Name and seconds of the fastest sample, in the order measured.
    fastest: Vec<(&'static str, f64)>,
}

impl<'criterion> Stage<'criterion> {
    /// A stage with a limit of `limit_bytes` bytes a pass.
    pub fn new(
        criterion: &'criterion mut Criterion,
        name: impl Into<String>,
        limit_bytes: usize,
        limit_name: &'static str,
        limit: impl FnMut() -> u64,
    ) -> Self {
        let name = name.into();
        let mut group = criterion.benchmark_group(&name);
        group.throughput(Throughput::Bytes(limit_bytes as u64));
        let mut stage = Self { name, group, fastest: Vec::new() };
        stage.beside(limit_name, limit);
        stage
    }

    /// Measures a routine that does the limit's work, or does it in the engine's way.
    pub fn beside(&mut self, name: &'static str, mut routine: impl FnMut() -> u64) -> &mut Self {
        self.measure(name, |passes| {
            let began = Instant::now();
            for _ in 0..passes {
                black_box(routine());
            }
            began.elapsed()
        })
    }

    /// Measures a routine that consumes the result of `prepare`, without the time of `prepare`.
    pub fn beside_prepared<T>(
        &mut self,
        name: &'static str,
        mut prepare: impl FnMut() -> T,
        mut routine: impl FnMut(&T) -> u64,
    ) -> &mut Self {
        self.measure(name, |passes| {
            let mut taken = Duration::ZERO;
            for _ in 0..passes {
                let prepared = black_box(prepare());
                let began = Instant::now();
                black_box(routine(&prepared));
                taken += began.elapsed();
            }
            taken
        })
    }

    fn measure(&mut self, name: &'static str, mut time: impl FnMut(u64) -> Duration) -> &mut Self {
        let mut fastest = f64::INFINITY;
        self.group.bench_function(name, |bencher: &mut Bencher<'_>| {
            bencher.iter_custom(|passes| {
                let taken = time(passes);
                if taken >= SAMPLE_MIN {
                    fastest = fastest.min(taken.as_secs_f64() / passes as f64);
                }
                taken
            });
        });
        self.fastest.push((name, fastest));
        self
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        let Some(&(limit_name, limit)) = self.fastest.first() else { return };
        // A filter on the command line skips routines; a stage without its limit has no ratios.
        let measured: Vec<_> = self.fastest[1..].iter().filter(|(_, seconds)| seconds.is_finite()).collect();
        if !crate::measuring() || !limit.is_finite() || measured.is_empty() {
            return;
        }
        println!("{}: speed, with that of {limit_name} as 1", self.name);
        for (name, seconds) in measured {
            println!("  {:>8.3}  {name}", limit / seconds);
        }
        println!();
    }
}

impl fmt::Debug for Stage<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Stage")
            .field("name", &self.name)
            .field("fastest", &self.fastest)
            .finish_non_exhaustive()
    }
}

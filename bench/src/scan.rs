//! `sterna-bench scan`: the bitmaps' part of a round, from 1 GiB to 4 TiB of RAM, beside its limit and
//! plainer ways.
//!
//! All routines of a row are measured in turn, again and again, so that other load on the machine affects
//! all alike; a ratio is made of times of the same turn.

use std::fmt::Write;
use std::fs;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::Args;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use sterna::dirty::{DirtyBitmap, Stripes};
use sterna_bench::dirty::Pattern;
use sterna_bench::plain_read;
use sterna_bench::reference::{bit_by_bit, clean_atomic, mark_atomic, scan};
use vm_memory::bitmap::AtomicBitmap;

use crate::peers::statistics::Spread;

const GIB: u64 = 1 << 30;

/// The words of a memory slot of 64 GiB: as much as `KVM_GET_DIRTY_LOG` copies at once.
const SLOT_WORDS: usize = 1 << 18;

/// A shorter sample measures the clock rather than the routine.
const SAMPLE_MIN: Duration = Duration::from_millis(2);

#[derive(Debug, Args)]
pub(crate) struct ScanArgs {
    /// A first impression: two sizes, three turns
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 7, or 3 if --quick]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: Option<u8>,
    /// Sizes of RAM, in GiB [default: 1 to 4096, or 64 and 1024 if --quick]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=16_384), value_name = "GIB,…")]
    ram: Vec<u64>,
    /// Only patterns with this in their name, such as `0.1 % random`
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    dirty: String,
    /// Also write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The routines of a row, by their position in a turn.
#[derive(Clone, Copy)]
enum Routine {
    Read,
    Scan,
    Round,
    Copy,
    Read2,
    Scan2,
    Registers,
    Registers2,
    BitByBit,
    Atomic,
}

const ROUTINES: [Routine; 10] = {
    use Routine as R;
    [
        R::Read,
        R::Scan,
        R::Round,
        R::Copy,
        R::Read2,
        R::Scan2,
        R::Registers,
        R::Registers2,
        R::BitByBit,
        R::Atomic,
    ]
};

/// A row of the table; all but the first two are ratios of speeds.
#[derive(Debug, Serialize)]
struct Row {
    ram_gib: u64,
    dirty: String,
    /// The speed of the plain read, in GiB of bitmap a second.
    read_gib_per_s: Figure,
    scan_to_read: Figure,
    round_to_read: Figure,
    two_to_one: Figure,
    /// The speedup of a loop without memory accesses: what a second processor of the machine gains at that
    /// moment.
    two_to_one_in_registers: Figure,
    two_to_two_reads: Figure,
    scan_to_bit_by_bit: Figure,
    scan_to_atomic: Figure,
    round_ms: Figure,
    copy_ms: Figure,
    round_to_copy: Figure,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Figure {
    median: f64,
    min: f64,
    max: f64,
}

impl Figure {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.collect();
        let none = Spread { median: f64::NAN, min: f64::NAN, max: f64::NAN };
        let Spread { median, min, max } = Spread::of(&values).unwrap_or(none);
        Self { median, min, max }
    }

    fn cell(self) -> String {
        let digits = if self.median >= 100.0 { 0 } else { 2 };
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.min, self.max)
    }
}

pub(crate) fn run(args: &ScanArgs) -> ExitCode {
    let sizes: &[u64] = match &args.ram[..] {
        [] if args.quick => &[64, 1024],
        [] => &[1, 16, 64, 256, 1024, 4096],
        sizes => sizes,
    };
    let repeat = args.repeat.unwrap_or(if args.quick { 3 } else { 7 });
    let pool = match ThreadPoolBuilder::new().num_threads(2).build() {
        Ok(pool) => pool,
        Err(error) => {
            eprintln!("error: no two threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{HEAD}");
    let mut rows = Vec::new();
    for &ram_gib in sizes {
        for pattern in patterns().into_iter().filter(|pattern| pattern.to_string().contains(&args.dirty)) {
            let row = Bench::new(ram_gib * GIB, pattern, &pool).row(ram_gib, repeat);
            println!("{}", row.line());
            rows.push(row);
        }
    }
    if let Some(cost) = fixed_cost(&rows) {
        println!("\n{cost}");
    }
    let Some(file) = &args.json else { return ExitCode::SUCCESS };
    let written = serde_json::to_vec_pretty(&rows).map_err(Into::into).and_then(|json| fs::write(file, json));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {} cannot be written: {error}", file.display());
            ExitCode::FAILURE
        }
    }
}

const HEAD: &str = "\
| RAM, GiB | dirty | plain read, GiB/s | scan ÷ plain read | round ÷ plain read | 2 workers ÷ 1 | the same in registers | 2 workers ÷ their plain read | scan ÷ bit by bit | scan ÷ get_and_reset and bits |
|---|---|---|---|---|---|---|---|---|---|";

fn patterns() -> Vec<Pattern> {
    use Pattern as P;
    let between = [1, 10, 100, 500].into_iter().flat_map(|share| [P::clustered(share), P::random(share)]);
    [P::random(0)].into_iter().chain(between).chain([P::random(1000)]).collect()
}

impl Row {
    fn line(&self) -> String {
        let figures = [
            self.read_gib_per_s,
            self.scan_to_read,
            self.round_to_read,
            self.two_to_one,
            self.two_to_one_in_registers,
            self.two_to_two_reads,
            self.scan_to_bit_by_bit,
            self.scan_to_atomic,
        ];
        let mut line = format!("| {} | {} |", self.ram_gib, self.dirty);
        line.extend(figures.map(|figure| format!(" {} |", figure.cell())));
        line
    }
}

/// The cost of a round without dirty pages, if it was measured.
fn fixed_cost(rows: &[Row]) -> Option<String> {
    let mut lines = rows.iter().filter(|row| row.dirty == Pattern::random(0).to_string()).peekable();
    lines.peek()?;
    let mut text = FIXED_COST_HEAD.to_owned();
    for row in lines {
        let per_tib = |figure: Figure| figure.median * 1024.0 / row.ram_gib as f64;
        let (round, copy, ratio) = (per_tib(row.round_ms), per_tib(row.copy_ms), row.round_to_copy.cell());
        let _ = writeln!(text, "| {} | {round:.2} | {copy:.2} | {ratio} |", row.ram_gib);
    }
    Some(text)
}

const FIXED_COST_HEAD: &str = "\
| RAM, GiB | nothing dirty: a round, ms per TiB | of it the kernel's copy | round ÷ copy (speeds) |
|---|---|---|---|
";

/// A bitmap, the kernel's log that it is made from, and the pool that works on them.
struct Bench<'pool> {
    pattern: Pattern,
    pool: &'pool ThreadPool,
    bitmap: DirtyBitmap,
    /// The kernel's log, and the buffer for its copies.
    log: Vec<u64>,
    scratch: Vec<u64>,
    atomic: AtomicBitmap,
}

impl<'pool> Bench<'pool> {
    fn new(ram_bytes: u64, pattern: Pattern, pool: &'pool ThreadPool) -> Self {
        let bitmap = pattern.bitmap(ram_bytes);
        let log = bitmap.regions()[0].words().to_vec();
        let atomic = clean_atomic(log.len());
        Self { pattern, pool, bitmap, scratch: vec![1; SLOT_WORDS.min(log.len())], log, atomic }
    }

    fn row(&mut self, ram_gib: u64, repeat: u8) -> Row {
        // Before the first turn, the number of passes per sample is determined. A short routine is timed by a
        // second pass, because a pass with cold caches takes several times as long. Of two workers one may
        // begin a little later.
        let passes = ROUTINES.map(|routine| {
            let first = self.time(routine, 1);
            let one = if first < SAMPLE_MIN { self.time(routine, 1) } else { first };
            let one = one.max(Duration::from_nanos(1));
            u32::try_from(SAMPLE_MIN.as_nanos() / one.as_nanos()).unwrap_or(0).clamp(2, 100_000)
        });
        let turns: Vec<[f64; ROUTINES.len()]> = (0..repeat)
            .map(|_| {
                let mut seconds = [0.0; ROUTINES.len()];
                for (routine, &passes) in ROUTINES.into_iter().zip(&passes) {
                    seconds[routine as usize] = self.time(routine, passes).as_secs_f64() / f64::from(passes);
                }
                seconds
            })
            .collect();
        let faster = |fast: Routine, slow: Routine| {
            Figure::of(turns.iter().map(|seconds| seconds[slow as usize] / seconds[fast as usize]))
        };
        let milliseconds =
            |routine: Routine| Figure::of(turns.iter().map(|seconds| seconds[routine as usize] * 1e3));
        let gib = size_of_val(&self.log[..]) as f64 / GIB as f64;
        Row {
            ram_gib,
            dirty: self.pattern.to_string(),
            read_gib_per_s: Figure::of(turns.iter().map(|seconds| gib / seconds[Routine::Read as usize])),
            scan_to_read: faster(Routine::Scan, Routine::Read),
            round_to_read: faster(Routine::Round, Routine::Read),
            two_to_one: faster(Routine::Scan2, Routine::Scan),
            two_to_one_in_registers: faster(Routine::Registers2, Routine::Registers),
            two_to_two_reads: faster(Routine::Scan2, Routine::Read2),
            scan_to_bit_by_bit: faster(Routine::Scan, Routine::BitByBit),
            scan_to_atomic: faster(Routine::Scan, Routine::Atomic),
            round_ms: milliseconds(Routine::Round),
            copy_ms: milliseconds(Routine::Copy),
            round_to_copy: faster(Routine::Round, Routine::Copy),
        }
    }

    fn time(&mut self, routine: Routine, passes: u32) -> Duration {
        if let Some(worker) = self.worker(routine) {
            return self.time_of_two(passes, worker);
        }
        let mut taken = Duration::ZERO;
        for _ in 0..passes {
            if matches!(routine, Routine::Atomic) {
                self.fill_atomic();
            }
            let began = Instant::now();
            black_box(self.pass(routine));
            taken += began.elapsed();
        }
        taken
    }

    /// Both workers are awake when the time begins, and go through all passes without waiting for each other:
    /// a virtual processor that sleeps can take longer to wake up than a pass does.
    fn time_of_two(&self, passes: u32, worker: impl Fn(usize) -> u64 + Sync) -> Duration {
        let start = Barrier::new(2);
        let times = self.pool.broadcast(|context| {
            start.wait();
            let began = Instant::now();
            for _ in 0..passes {
                black_box(worker(context.index()));
            }
            began.elapsed()
        });
        times.into_iter().max().unwrap_or_default()
    }

    /// The work of each of two workers in a pass, if the routine is for two.
    fn worker(&self, routine: Routine) -> Option<Box<dyn Fn(usize) -> u64 + Sync + '_>> {
        let half = self.log.len().div_ceil(2);
        match routine {
            Routine::Read2 => Some(Box::new(move |index| {
                self.bitmap.regions()[0].words().chunks(half).nth(index).map_or(0, plain_read)
            })),
            Routine::Scan2 => Some(Box::new(|index| scan(&Stripes::new(2), index, &self.bitmap))),
            Routine::Registers2 => Some(Box::new(|_| in_registers(REGISTERS_ROUNDS / 2))),
            _ => None,
        }
    }

    fn pass(&mut self, routine: Routine) -> u64 {
        match routine {
            Routine::Read => plain_read(self.bitmap.regions()[0].words()),
            Routine::Scan => scan(&Stripes::new(1), 0, &self.bitmap),
            Routine::Round => self.round(),
            Routine::Copy => {
                self.copy(|_, _, _| ());
                0
            }
            Routine::Registers => in_registers(REGISTERS_ROUNDS),
            Routine::Read2 | Routine::Scan2 | Routine::Registers2 => {
                let worker = self.worker(routine);
                let sums = self
                    .pool
                    .broadcast(|context| worker.as_ref().map_or(0, |worker| worker(context.index())));
                sums.into_iter().fold(0, u64::wrapping_add)
            }
            Routine::BitByBit => bit_by_bit(black_box(&self.log)),
            Routine::Atomic => bit_by_bit(&self.atomic.get_and_reset()),
        }
    }

    /// A round's work with bitmaps: clears what was sent, copies the kernel's log slot by slot, and finds the
    /// runs.
    fn round(&mut self) -> u64 {
        self.bitmap.clear();
        self.copy(|bitmap, first_word, words| bitmap.regions_mut()[0].mark_words(first_word, words));
        scan(&Stripes::new(1), 0, &self.bitmap)
    }

    /// Copies the log slot by slot, as the kernel does, and passes each on with the index of its first word.
    fn copy(&mut self, mut take: impl FnMut(&mut DirtyBitmap, usize, &[u64])) {
        for (index, slot) in self.log.chunks(SLOT_WORDS).enumerate() {
            let copy = &mut self.scratch[..slot.len()];
            copy.copy_from_slice(slot);
            take(&mut self.bitmap, index * SLOT_WORDS, black_box(copy));
        }
    }

    fn fill_atomic(&self) {
        mark_atomic(&self.atomic, &self.log);
    }
}

/// Rounds of a pass of [`in_registers`]: some tenths of a millisecond.
const REGISTERS_ROUNDS: u64 = 1 << 17;

/// Work that waits for nothing: neither memory nor a mispredicted branch. Two virtual processors on one core
/// of the host do no more of this work than one.
fn in_registers(rounds: u64) -> u64 {
    let mut values = [1u64, 2, 3, 4, 5, 6];
    for round in 0..black_box(rounds) {
        values = values.map(|value| value.rotate_left(7) ^ round);
    }
    values.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_finds_the_same_runs() {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for pattern in patterns() {
            let mut bench = Bench::new(GIB, pattern, &pool);
            let expected = bench.pass(Routine::BitByBit);
            bench.fill_atomic();
            assert_eq!(bench.pass(Routine::Atomic), expected, "{pattern}");
            // A run ends with its stripe, for every routine.
            let by_stripe = bench.pass(Routine::Scan);
            assert_eq!(bench.pass(Routine::Round), by_stripe, "{pattern}");
            assert_eq!(bench.pass(Routine::Scan2), by_stripe, "{pattern}");
            let row = bench.row(1, 1);
            assert!(row.round_ms.median > 0.0 && row.line().matches('|').count() == 11, "{}", row.line());
        }
    }
}

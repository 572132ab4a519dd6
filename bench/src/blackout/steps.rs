//! Each step of the engine's switch over synthetic RAM, from the pause to FINAL, without sending a page.
//!
//! Every turn has all steps, the copy that a kernel makes of its bitmap, and a plain read of the bitmap by
//! one thread, the least that a walk over the whole bitmap takes.

use std::hint::black_box;
use std::time::Instant;

use serde_json::Value;
use sterna::memory::{GuestRam, PAGE_BYTES};
use sterna::source::Blackout;
use sterna::verify::Verify;
use sterna_bench::{plain_read, ram};

use super::arguments::BlackoutArgs;
use super::failure::Failure;
use super::log::SlotLog;
use super::table::{Column, head, row};

const GIB: u64 = 1 << 30;

/// The times of a turn, in milliseconds.
#[derive(Debug, Default)]
struct Turn {
    read: f64,
    copy: f64,
    harvest: f64,
    digests_off: f64,
    digests_final: f64,
    plan: f64,
    send: f64,
    send_looking_up: f64,
}

impl Turn {
    /// From the pause to FINAL: without comparing, without the lanes and without the kernel's copy.
    fn less_lanes(&self) -> f64 {
        self.harvest - self.copy + self.digests_off + self.plan
    }

    /// From the pause to FINAL: without comparing, without sending and without the kernel's copy.
    fn less_copy(&self) -> f64 {
        self.less_lanes() + self.send
    }
}

const COLUMNS: [Column<Turn>; 10] = [
    ("plain read of the bitmap", |turn| turn.read),
    ("kernel's copy by itself", |turn| turn.copy),
    ("harvest with the copy", |turn| turn.harvest),
    ("digests, off", |turn| turn.digests_off),
    ("digests, final", |turn| turn.digests_final),
    ("plan", |turn| turn.plan),
    ("null lanes", |turn| turn.send),
    ("lanes that look up slices", |turn| turn.send_looking_up),
    ("pause to FINAL, less copy and lanes", Turn::less_lanes),
    ("pause to FINAL, less copy", Turn::less_copy),
];

pub(super) fn table(args: &BlackoutArgs) -> Result<Vec<Value>, Failure> {
    println!(
        "From the pause to FINAL, {} in 10,000 pages dirty, {} workers, in ms; \"pause to FINAL\" is harvest, digests off, plan and \
         null lanes, less the copy:\n",
        args.dirty,
        args.workers()
    );
    println!("{}", head(&["RAM, GiB", "dirty pages", "slices"], COLUMNS.iter().map(|(name, _)| *name)));
    let mut rows = Vec::new();
    for &gib in args.sizes_gib() {
        for (kind, run_pages) in [("scattered", 1), ("in runs of 64", 64)] {
            let mut bench = Steps::new(gib * GIB, args, run_pages)?;
            // The first turn finds the caches cold and no buffers allocated.
            bench.turn()?;
            let turns = (0..args.turns()).map(|_| bench.turn()).collect::<Result<Vec<_>, _>>()?;
            let first = [gib.to_string(), format!("{} {kind}", bench.pages), bench.chunks.to_string()];
            let (line, figures) = row(&first, &COLUMNS, &turns);
            println!("{line}");
            rows.push(figures);
        }
    }
    Ok(rows)
}

struct Steps {
    log: SlotLog,
    off: Blackout,
    /// With digests of all pages, which are computed before each turn.
    compared: Blackout,
    chunks: usize,
    /// Dirty pages in a turn.
    pages: u64,
}

impl Steps {
    fn new(ram_bytes: u64, args: &BlackoutArgs, run_pages: u64) -> Result<Self, Failure> {
        let memory = ram::untouched::<()>(usize::try_from(ram_bytes)?);
        let ram = GuestRam::from_vm_memory(&memory)?;
        let log = SlotLog::new(ram_bytes / PAGE_BYTES, args.dirty, run_pages);
        let mut off = Blackout::new(ram.clone(), args.workers(), Verify::Off)?;
        let chunks = off.register_all();
        let compared = Blackout::new(ram, args.workers(), Verify::Final)?;
        Ok(Self { log, off, compared, chunks, pages: 0 })
    }

    fn turn(&mut self) -> Result<Turn, Failure> {
        let Self { log, off, compared, .. } = self;
        let read = timed(|| black_box(plain_read(log.words()))).1;
        let mut turn = Turn { read, copy: timed(|| log.copy()).1, ..Turn::default() };
        off.clear();
        let (harvested, took) = timed(|| off.harvest(log));
        (self.pages, turn.harvest) = (harvested?, took);
        turn.digests_off = timed(|| off.note()).1;
        let (missing, took) = timed(|| off.plan());
        turn.plan = took;
        let mut sent = [0, 0];
        for (look_up, time) in [(false, &mut turn.send), (true, &mut turn.send_looking_up)] {
            let (pages, took) = timed(|| off.send(look_up));
            (sent[usize::from(look_up)], *time) = (pages?, took);
        }
        if missing != 0 || sent != [self.pages; 2] {
            return Err("a step did not find what is dirty".into());
        }
        compared.clear();
        compared.harvest(log)?;
        compared.settle();
        turn.digests_final = timed(|| compared.note()).1;
        Ok(turn)
    }
}

/// The result of `work`, and its duration in milliseconds.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed().as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        args: BlackoutArgs,
    }

    #[test]
    fn a_turn_times_every_step() {
        let args = Words::parse_from(["", "--lanes=2", "--dirty=5"]).args;
        let mut bench = Steps::new(GIB, &args, 1).unwrap();
        let turn = bench.turn().unwrap();
        assert!(bench.chunks > 16 && bench.pages > 100);
        assert!(turn.read > 0.0 && turn.harvest > 0.0 && turn.send > 0.0);
        let (line, _) = row(&[], &COLUMNS, &[turn]);
        assert_eq!(line.matches(" |").count(), COLUMNS.len() + 1, "{line}");
    }
}

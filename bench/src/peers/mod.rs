//! The comparison: all measurements in one run on one machine, interleaved and repeated, so that their ratios
//! are meaningful.
//!
//! | file | |
//! |---|---|
//! | `limit` | `ib_write_bw`: the device's write speed |
//! | `plain`, `tcp` | TCP's speed: a plain stream under the lanes' conditions, and `iperf3` |
//! | `qemu` | QEMU's migrations: the guest as a boot sector, the QMP client, a run |
//! | `sterna_runs` | the `sterna` command; the engine between two guests in this process |
//! | `memory` | the zero test beside a plain read |
//! | `speeds` | lanes beside their limits, in turns |
//! | `record`, `ratios`, `table` | the measurements; the figures that have an aim; the output of both |
//! | `first_touch` | memory that the machine has not yet received from its host |
//! | `statistics`, `compare`, `cpu`, `profile` | shared parts: figures |
//! | `process`, `device`, `setup`, `migration`, `failure` | shared parts: runs |

mod compare;
mod cpu;
mod device;
mod failure;
mod first_touch;
mod limit;
mod memory;
mod migration;
pub(crate) mod plain;
mod process;
mod profile;
mod qemu;
mod ratios;
mod record;
mod setup;
mod speeds;
pub(crate) mod statistics;
mod sterna_runs;
mod table;
mod tcp;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use sterna::transport::rdma::RdmaProvider;
use sterna::transport::tcp::TcpProvider;

use self::failure::Failure;
use self::limit::Shape;
use self::migration::Load;
use self::ratios::names;
use self::record::Record;
use self::setup::Setup;
use self::speeds::Shapes;
use self::statistics::Spread;
pub(crate) use self::sterna_runs::sparse;

/// For `--help`.
const HELP: &str = "\
Needs perftest, iperf3 and qemu-system-x86 (Debian's names); what is missing is named in the table, and the rest measured.
Where this machine has no RDMA device:
  cargo build --release --workspace
  STERNA_LAB_MEMORY=10G STERNA_LAB_TIMEOUT=7200 ci/lab uml target/release/sterna-bench peers
A guest of SIZE takes twice that, and some 600 MiB more; the time to the first byte is measured with one of up to 8 GiB.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct PeersArgs {
    /// RAM of the guests, from 192M to 3G
    #[arg(long, default_value = "1G", value_name = "SIZE", value_parser = parse_size)]
    memory: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: u8,
    /// A first impression: fewer shapes of the limit, shorter measurements
    #[arg(long)]
    quick: bool,
    /// How long a migration may take to converge, in seconds; that of an idle guest may take twice as long
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "S")]
    patience: u64,
    /// The longest downtime of a guest, in ms
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "MS")]
    downtime_limit: u32,
    /// The largest drift of the limit between its measurements, in percent
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "PERCENT")]
    drift_max: u8,
    /// The number of streams in measurements of several streams
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=64), value_name = "N")]
    streams: u8,
    /// Measure only these parts, beside the limit
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,…")]
    only: Vec<Part>,
    /// Leave QEMU out
    #[arg(long)]
    without_qemu: bool,
    /// The RDMA device [default: the first with an active port]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The sterna command to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    sterna: Option<PathBuf>,
    /// Also write the tables to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The parts that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Lanes, iperf3, the zero test, own CPU, the guest of zeros
    Speeds,
    /// Migrations of the idle guest
    Idle,
    /// Migrations of the busy guest
    Loop,
    /// The time to the first byte
    FirstByte,
}

/// `192M` to `3G`: the boot sector reaches no further, and the loop does not fit into less.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size from 192M to 3G");
    let (number, shift) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 20),
        None => (text.strip_suffix(['G', 'g']).ok_or_else(wrong)?, 30),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
    if (192 << 20..=3 << 30).contains(&bytes) { Ok(bytes) } else { Err(wrong()) }
}

pub(crate) fn run(args: &PeersArgs) -> ExitCode {
    let setup = match Setup::find(args) {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut comparison =
        Comparison { args, setup, record: Record::default(), limits: Vec::new(), diverged: Vec::new() };
    let outcome = comparison.run();
    let ratios = ratios::ratios(&comparison.record, args.memory, args.downtime_limit);
    if let Err(error) = &outcome {
        eprintln!("error: {error}");
    } else {
        println!("{}", table::markdown(&ratios, &comparison.record));
    }
    if let Some(path) = &args.json {
        let mut json = table::json(&ratios, &comparison.record);
        json["error"] = outcome.as_ref().err().cloned().into();
        json["limits"] = comparison.limits.into();
        if let Err(error) = fs::write(path, format!("{json:#}\n")) {
            eprintln!("error: {} cannot be written: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Comparison<'args> {
    args: &'args PeersArgs,
    setup: Setup,
    record: Record,
    /// Every measurement of the limit, in MB/s.
    limits: Vec<f64>,
    /// Migrations that did not converge: one attempt is enough and takes long.
    diverged: Vec<(Load, By)>,
}

impl Comparison<'_> {
    fn run(&mut self) -> Result<(), String> {
        let touched = first_touch::touch_free_memory().map_err(|failure| failure.to_string())?;
        eprintln!("touched {} MiB of free memory", touched >> 20);
        eprintln!("looking for the limit of {}", self.setup.device.name);
        let shapes = Shapes {
            best: limit::best(&self.setup.device, self.args.quick).map_err(|failure| failure.to_string()),
            uncached: limit::best_uncached(&self.setup.device).map_err(|failure| failure.to_string()),
        };
        let mut before = self.limit(&shapes.best)?;
        for repetition in 0..usize::from(self.args.repeat) {
            self.record.begin(repetition);
            eprintln!("repetition {} of {}", repetition + 1, self.args.repeat);
            if self.wants(Part::Speeds) {
                self.speeds(&shapes);
            }
            let mut migrations = self.migrations();
            // The order alternates, so that it favours no program.
            if repetition % 2 == 1 {
                migrations.reverse();
            }
            for migration in migrations {
                self.migrate(migration, &shapes);
            }
            if self.wants(Part::FirstByte) {
                self.first_bytes();
            }
            let after = self.limit(&shapes.best)?;
            // The limit of a repetition is the mean of those before and after it.
            let around = before.clone().and_then(|before| Ok(f64::midpoint(before, after.clone()?)));
            let fits_mb = around.clone().map(|limit| limit * f64::from(self.args.downtime_limit) / 1e3);
            self.record.note(names::LIMIT, "MB/s", around);
            self.record.note(names::FITS, "MB", fits_mb);
            before = after;
        }
        if let Ok(shape) = &shapes.best {
            println!("The best shape: `ib_write_bw {shape}` on {}\n", self.setup.device.name);
        }
        if let Ok(shape) = &shapes.uncached {
            println!("In memory that no cache holds: `ib_write_bw {shape}`\n");
        }
        Ok(())
    }

    fn wants(&self, part: Part) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&part)
    }

    /// Measures the limit; fails if it has drifted too far.
    fn limit(&mut self, shape: &Result<Shape, String>) -> Result<Result<f64, String>, String> {
        let speed = shape.clone().and_then(|shape| {
            limit::speed(&self.setup.device, shape, self.limit_bytes()).map_err(|failure| failure.to_string())
        });
        match &speed {
            Ok(speed) => {
                eprintln!("  the limit: {speed:.0} MB/s");
                self.limits.push(*speed);
            }
            Err(failure) => eprintln!("  the limit: {failure}"),
        }
        let drift = Spread::of(&self.limits).map_or(0.0, Spread::drift);
        if drift > f64::from(self.args.drift_max) / 100.0 {
            return Err(format!(
                "the limit drifted by {:.0} % between its measurements ({:.0?} MB/s), so the ratios would mean nothing: \
                 something else used this machine. Run it again with nothing beside it, or see --drift-max",
                drift * 100.0,
                self.limits
            ));
        }
        Ok(speed)
    }

    fn limit_bytes(&self) -> u64 {
        if self.args.quick { 1 << 30 } else { 2 << 30 }
    }

    fn note<E: ToString>(&mut self, name: &str, unit: &'static str, outcome: Result<f64, E>) {
        let outcome = outcome.map_err(|failure| failure.to_string());
        match &outcome {
            Ok(value) => eprintln!("  {name}: {value:.3} {unit}"),
            Err(failure) => eprintln!("  {name}: {failure}"),
        }
        self.record.note(name, unit, outcome);
    }

    /// All migrations of a repetition, in their order.
    fn migrations(&self) -> Vec<(Load, By)> {
        let mut all = Vec::new();
        for (load, part) in [(Load::Idle, Part::Idle), (Load::Loop, Part::Loop)] {
            if !self.wants(part) {
                continue;
            }
            // Each of Sterna's migrations next to QEMU's that it is compared with.
            let all_ways = [
                By::Qemu(qemu::Way::Tcp),
                By::Qemu(qemu::Way::Multifd),
                By::SternaTcp,
                By::Qemu(qemu::Way::Rdma),
                By::SternaRdma,
                By::Qemu(qemu::Way::RdmaPinAll),
            ];
            let wanted = |by: &By| !(self.args.without_qemu && matches!(by, By::Qemu(_)));
            all.extend(all_ways.into_iter().filter(wanted).map(|by| (load, by)));
            if load == Load::Loop {
                all.push((load, By::SternaRdmaUnthrottled));
            }
        }
        all
    }

    fn migrate(&mut self, (load, by): (Load, By), shapes: &Shapes) {
        if self.diverged.contains(&(load, by)) {
            return;
        }
        // Just before and just after the migration that is compared with it.
        if (load, by) == (Load::Idle, By::SternaRdma) {
            self.idle_limits(shapes);
            self.migrate_once((load, by));
            self.idle_limits(shapes);
        } else {
            self.migrate_once((load, by));
        }
    }

    fn idle_limits(&mut self, shapes: &Shapes) {
        self.note_limit(names::LIMIT_IDLE, &shapes.best);
        self.note_limit(names::LIMIT_IDLE_UNCACHED, &shapes.uncached);
    }

    fn migrate_once(&mut self, (load, by): (Load, By)) {
        let setup = &self.setup;
        let (name, outcome) = match (by, load) {
            (By::Qemu(way), load) => (way.name(), qemu::migrate(setup, way, load)),
            (By::SternaTcp, Load::Idle) => (names::OURS_TCP, sterna_runs::migrate(setup, "tcp")),
            (By::SternaTcp, Load::Loop) => (names::OURS_TCP, sterna_runs::busy(setup, TcpProvider, true)),
            (By::SternaRdmaUnthrottled, _) => (
                "sterna rdma, never slowing the guest",
                sterna_runs::busy(setup, RdmaProvider::default(), false),
            ),
            (By::SternaRdma, Load::Idle) => (names::OURS_RDMA, sterna_runs::migrate(setup, "rdma")),
            (By::SternaRdma, Load::Loop) => {
                (names::OURS_RDMA, sterna_runs::busy(setup, RdmaProvider::default(), true))
            }
        };
        if let Err(Failure::NotConverged(_) | Failure::NotEnded(_)) = outcome {
            self.diverged.push((load, by));
        }
        self.record.migration(load, name, outcome);
    }
}

/// The program that moves a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    SternaRdma,
    SternaRdmaUnthrottled,
    SternaTcp,
    Qemu(qemu::Way),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_bounds() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        for text in ["", "M", "1", "191M", "4G", "-1G", "99999999999999999999G", "18446744073709551615G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}

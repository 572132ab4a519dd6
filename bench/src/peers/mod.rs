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
//! | `speeds`, `migrations` | lanes beside their limits, in turns; migrations of the two guests |
//! | `comparison` | what was found so far, and the limit, whose drift ends the comparison |
//! | `record`, `ratios`, `table` | the measurements; the figures that have an aim; the output of both |
//! | `first_touch` | memory that the machine has not yet received from its host |
//! | `statistics`, `compare`, `cpu`, `profile` | shared parts: figures |
//! | `process`, `device`, `arguments`, `setup`, `migration`, `failure` | shared parts: runs |

mod arguments;
mod compare;
mod comparison;
mod cpu;
mod device;
mod failure;
mod first_touch;
mod limit;
mod memory;
mod migration;
mod migrations;
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
use std::process::ExitCode;

use self::arguments::Part;
pub(crate) use self::arguments::PeersArgs;
use self::comparison::Comparison;
use self::device::RdmaDevice;
use self::failure::Failure;
use self::limit::Shape;
use self::ratios::names;
use self::record::Record;
use self::setup::Setup;
use self::speeds::Shapes;
pub(crate) use self::sterna_runs::{lanes_within, sparse};

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

impl Comparison<'_> {
    fn run(&mut self) -> Result<(), String> {
        let touched = first_touch::touch_free_memory().map_err(|failure| failure.to_string())?;
        eprintln!("touched {} MiB of free memory", touched >> 20);
        let (device, quick) = (self.setup.device(), self.args.quick);
        let shape = |of: &dyn Fn(&RdmaDevice) -> Result<Shape, Failure>| {
            device.as_ref().map_err(ToString::to_string).and_then(|device| {
                eprintln!("looking for the limit of {}", device.name);
                of(device).map_err(|failure| failure.to_string())
            })
        };
        let shapes = Shapes {
            best: shape(&|device| limit::best(device, quick)),
            uncached: shape(&limit::best_uncached),
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
            self.record.note(self.limit_name(), "MB/s", around);
            self.record.note(names::FITS, "MB", fits_mb);
            before = after;
        }
        if let (Ok(shape), Ok(device)) = (&shapes.best, self.setup.device()) {
            println!("The best shape: `ib_write_bw {shape}` on {}\n", device.name);
        }
        if let Ok(shape) = &shapes.uncached {
            println!("In memory that no cache holds: `ib_write_bw {shape}`\n");
        }
        Ok(())
    }

    fn limit_name(&self) -> &'static str {
        if self.setup.device().is_ok() { names::LIMIT } else { names::LIMIT_TCP }
    }
}

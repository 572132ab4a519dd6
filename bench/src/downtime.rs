//! `sterna-bench downtime`: what journals and comparing memory add to the time in which no host runs the
//! guest.
//!
//! Whole migrations by the `sterna` command, each variant once in every repetition, and in reverse order in
//! every second one. The minimal cost of a journal's record is measured beside them: a write of as many bytes
//! and `fdatasync`, in the same folder.

use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};
use sterna::progress::DowntimeReport;
use tempfile::TempDir;

use crate::convergence::{Demo, Migration};
use crate::peers::statistics::Spread;

#[derive(Debug, Args)]
pub(crate) struct DowntimeArgs {
    /// How often everything is measured
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: u8,
    /// RAM of the guest
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    memory: String,
    /// How fast the guest writes, in MB/s
    #[arg(long, default_value_t = 5, value_name = "MB/S")]
    dirty_rate: u64,
    /// The guest's machine: kvm or synthetic
    #[arg(long, default_value = "synthetic")]
    machine: String,
    /// The transport of pages: tcp or rdma
    #[arg(long, default_value = "tcp")]
    transport: String,
    /// A folder in memory, for journals that cost nothing
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    in_memory: PathBuf,
    /// A folder for journals on the disk to measure
    #[arg(long, default_value = ".", value_name = "DIR")]
    on_disk: PathBuf,
    /// The `sterna` command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    sterna: Option<PathBuf>,
    /// Also write the table to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

type Failure = Box<dyn std::error::Error>;

/// A record is two copies, a block each.
const RECORD_BYTES: usize = 2 * 4096;

const VERIFY: [&str; 3] = ["off", "final", "full"];

/// A part of the downtime: its name and its value.
type Part = (&'static str, fn(&DowntimeReport) -> f64);
const PARTS: [Part; 10] = [
    ("pause", |parts| parts.pause_ms),
    ("save", |parts| parts.save_ms),
    ("harvest", |parts| parts.harvest_ms),
    ("register", |parts| parts.register_ms),
    ("send", |parts| parts.send_ms),
    ("compare", |parts| parts.verify_ms),
    ("FINAL to PREPARED", |parts| parts.transfer_ms),
    ("revoke", |parts| parts.revoke_ms),
    ("load", |parts| parts.load_ms),
    ("COMMITTED to RUNNING", |parts| parts.start_ms),
];

pub(crate) fn run(args: &DowntimeArgs) -> ExitCode {
    match measure(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Journals in one folder.
struct Place {
    name: &'static str,
    folder: TempDir,
    /// The minimal cost of a record, in milliseconds.
    sync_ms: Vec<f64>,
    /// The migrations, by [`VERIFY`].
    migrations: [Vec<Migration>; 3],
}

impl Place {
    fn new(name: &'static str, beside: &Path) -> Result<Self, Failure> {
        let private = fs::Permissions::from_mode(0o700);
        let folder =
            tempfile::Builder::new().prefix("sterna-bench-").permissions(private).tempdir_in(beside)?;
        Ok(Self { name, folder, sync_ms: Vec::new(), migrations: Default::default() })
    }

    fn sync(&mut self) -> io::Result<()> {
        let file = File::create(self.folder.path().join("record"))?;
        file.write_all_at(&[1; RECORD_BYTES], 0)?;
        file.sync_all()?;
        for byte in 2..12 {
            let began = Instant::now();
            file.write_all_at(&[byte; RECORD_BYTES], 0)?;
            file.sync_data()?;
            self.sync_ms.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    }

    fn migrate(&mut self, args: &DowntimeArgs, verify: usize) -> Result<(), Failure> {
        let demo = Demo {
            program: Demo::program(args.sterna.as_deref()),
            common: vec![
                format!("--memory={}", args.memory),
                format!("--dirty-rate={}", args.dirty_rate),
                format!("--machine={}", args.machine),
                format!("--transport={}", args.transport),
            ],
            temporary: Some(self.folder.path().to_owned()),
        };
        let migration = demo.migrate(&[format!("--verify={}", VERIFY[verify])])?;
        self.migrations[verify].push(migration.ok_or("an idle guest did not converge")?);
        Ok(())
    }
}

fn measure(args: &DowntimeArgs) -> Result<(), Failure> {
    let mut places = [Place::new("memory", &args.in_memory)?, Place::new("disk", &args.on_disk)?];
    let ways: Vec<_> =
        (0..places.len()).flat_map(|place| (0..VERIFY.len()).map(move |verify| (place, verify))).collect();
    for repetition in 0..args.repeat {
        places.iter_mut().try_for_each(Place::sync)?;
        let mut order = ways.clone();
        if repetition % 2 == 1 {
            order.reverse();
        }
        for (place, verify) in order {
            places[place].migrate(args, verify)?;
        }
    }
    let rows: Vec<_> = ways.iter().map(|&(place, verify)| Row::of(&places[place], verify)).collect();
    println!("{}", markdown(&places, &rows));
    if let Some(path) = &args.json {
        fs::write(path, format!("{:#}\n", as_json(&places, &rows)))?;
    }
    Ok(())
}

struct Row {
    journals: &'static str,
    verify: &'static str,
    /// All of the downtime, as the source measures it, including the comparison.
    downtime: Option<Spread>,
    /// The downtime by the guest's own heartbeat.
    heartbeat: Option<Spread>,
    parts: Vec<(&'static str, Option<Spread>)>,
}

impl Row {
    fn of(place: &Place, verify: usize) -> Self {
        let spread = |of: &dyn Fn(&Migration) -> f64| {
            Spread::of(&place.migrations[verify].iter().map(of).collect::<Vec<_>>())
        };
        let part = |&(name, of): &Part| (name, spread(&|migration| of(&migration.downtime_measured)));
        Self {
            journals: place.name,
            verify: VERIFY[verify],
            downtime: spread(&|migration| migration.downtime_ms),
            heartbeat: spread(&|migration| migration.guest_downtime_ms.unwrap_or(f64::NAN)),
            parts: PARTS.iter().map(part).collect(),
        }
    }
}

fn markdown(places: &[Place], rows: &[Row]) -> String {
    let mut text = "| journals in | verify | downtime, ms | by the guest's heartbeat |".to_owned();
    PARTS.iter().for_each(|(name, _)| text += &format!(" {name} |"));
    text += "\n|---|---|---|---|";
    PARTS.iter().for_each(|_| text += "---|");
    for row in rows {
        let (downtime, heartbeat) = (cell(row.downtime), cell(row.heartbeat));
        let _ = write!(text, "\n| {} | {} | {downtime} | {heartbeat} |", row.journals, row.verify);
        row.parts.iter().for_each(|&(_, spread)| text += &format!(" {} |", cell(spread)));
    }
    text += "\n\n";
    for place in places {
        let _ = writeln!(
            text,
            "A record in {} by itself, written and synced: {} ms.",
            place.name,
            cell(Spread::of(&place.sync_ms))
        );
    }
    text
}

fn cell(spread: Option<Spread>) -> String {
    let text = |Spread { median, min, max }| format!("{median:.2} ({min:.2}–{max:.2})");
    spread.map_or("–".into(), text)
}

fn as_json(places: &[Place], rows: &[Row]) -> Value {
    let spread = |spread: Option<Spread>| match spread {
        Some(Spread { median, min, max }) => json!({ "median": median, "min": min, "max": max }),
        None => Value::Null,
    };
    let row = |row: &Row| {
        let parts: serde_json::Map<_, _> =
            row.parts.iter().map(|&(name, of)| (name.to_owned(), spread(of))).collect();
        json!({
            "journals": row.journals,
            "verify": row.verify,
            "downtime_ms": spread(row.downtime),
            "guest_downtime_ms": spread(row.heartbeat),
            "parts_ms": parts,
        })
    };
    let record =
        |place: &Place| json!({ "journals": place.name, "sync_ms": spread(Spread::of(&place.sync_ms)) });
    json!({
        "migrations": rows.iter().map(row).collect::<Vec<_>>(),
        "records": places.iter().map(record).collect::<Vec<_>>(),
    })
}

//! `sterna-bench blackout`: the parts of the time in which no host runs the guest, and their growth with the
//! guest's RAM.
//!
//! | table | |
//! |---|---|
//! | [`steps`] | synthetic RAM of up to 12 TiB: each step of the switch, beside a plain read of the bitmap |
//! | [`engine`] | whole migrations of sparse RAM of the same sizes within this process |
//! | [`real`] | with `--real`: guests with all of their RAM touched, between two processes |

mod engine;
mod log;
mod real;
mod steps;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use crate::peers::statistics::Spread;

/// For `--help`.
const HELP: &str = "\
Without --real, needs about 2 GiB for RAM of 12 TiB, of which only bitmaps are there. With --real, twice the largest guest, \
and an RDMA device. Where this machine has none:
  cargo build --release --workspace
  STERNA_LAB_MEMORY=10G ci/lab uml target/release/sterna-bench blackout --real";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct BlackoutArgs {
    /// A first impression: 64 GiB and 12 TiB, three turns; with --real, 256 MiB and 1 GiB, one migration each
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 7; 3 for each real guest]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: Option<u8>,
    /// Sizes of synthetic RAM, in GiB [default: 1,64,1024,4096,12288]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=16_384), value_name = "GIB,…")]
    ram: Vec<u64>,
    /// Dirty pages in 10,000 at the pause
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=5000), value_name = "N")]
    dirty: u64,
    /// The number of lanes, and so of workers
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N")]
    lanes: u8,
    /// Move guests with all of their RAM touched between real processes, in place of synthetic RAM
    #[arg(long)]
    real: bool,
    /// RAM of the real guests, in MiB [default: 256,1024,2048,4096]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(16..=65_536), value_name = "MIB,…")]
    memory: Vec<u64>,
    /// The transport of real guests' pages: rdma or tcp
    #[arg(long, default_value = "rdma", value_parser = ["rdma", "tcp"])]
    transport: String,
    /// The `sterna` command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    sterna: Option<PathBuf>,
    /// Also write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

type Failure = Box<dyn std::error::Error>;

pub(crate) fn run(args: &BlackoutArgs) -> ExitCode {
    match measure(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &BlackoutArgs) -> Result<(), Failure> {
    let figures = if args.real {
        json!({ "real": real::table(args)? })
    } else {
        let steps = steps::table(args)?;
        println!();
        json!({ "steps": steps, "engine": engine::table(args)? })
    };
    if let Some(file) = &args.json {
        fs::write(file, format!("{figures:#}\n"))?;
    }
    Ok(())
}

impl BlackoutArgs {
    fn sizes_gib(&self) -> &[u64] {
        match &self.ram[..] {
            [] if self.quick => &[64, 12_288],
            [] => &[1, 64, 1024, 4096, 12_288],
            sizes => sizes,
        }
    }

    fn turns(&self) -> u8 {
        self.repeat.unwrap_or(if self.quick { 3 } else { 7 })
    }
}

/// A column of a table: its name and its value for a repetition.
type Column<T> = (&'static str, fn(&T) -> f64);

fn head(first: &[&'static str], columns: impl IntoIterator<Item = &'static str>) -> String {
    let names: Vec<_> = first.iter().copied().chain(columns).collect();
    format!("| {} |\n|{}", names.join(" | "), "---|".repeat(names.len()))
}

/// A row of a table, and the same as JSON.
fn row<T>(first: &[String], columns: &[Column<T>], turns: &[T]) -> (String, Value) {
    let mut line = format!("| {} |", first.join(" | "));
    let mut object = serde_json::Map::new();
    for (name, of) in columns {
        let spread = Spread::of(&turns.iter().map(of).collect::<Vec<_>>());
        line += &format!(" {} |", cell(spread));
        object.insert((*name).to_owned(), value(spread));
    }
    (line, json!({ "row": first, "figures": object }))
}

fn cell(spread: Option<Spread>) -> String {
    let text = |Spread { median, min, max }| {
        let digits = if median >= 100.0 { 0 } else { 2 };
        format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
    };
    spread.map_or("–".into(), text)
}

fn value(spread: Option<Spread>) -> Value {
    spread.map_or(
        Value::Null,
        |spread| json!({ "median": spread.median, "min": spread.min, "max": spread.max }),
    )
}

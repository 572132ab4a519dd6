//! Whole migrations of sparse RAM within this process, over TCP: the figures, including the state, FINAL and
//! GO, are from the engine's own report.

use serde_json::Value;
use sterna::progress::Report;

use super::arguments::BlackoutArgs;
use super::failure::Failure;
use super::table::{Column, head, row};
use crate::peers::sparse;

const COLUMNS: [Column<Report>; 8] = [
    ("pause and save", |report| report.measured.pause_ms + report.measured.save_ms),
    ("harvest", |report| report.measured.harvest_ms),
    ("send", |report| report.measured.send_ms),
    ("state, FINAL to PREPARED", |report| report.measured.transfer_ms),
    ("revoke", |report| report.measured.revoke_ms),
    ("load", |report| report.measured.load_ms),
    ("GO to RUNNING", |report| report.measured.start_ms),
    ("downtime", |report| report.downtime_ms),
];

pub(super) fn table(args: &BlackoutArgs) -> Result<Vec<Value>, Failure> {
    println!("A migration of RAM that is nearly all untouched, over TCP in this process, in ms:\n");
    println!("{}", head(&["RAM, GiB"], COLUMNS.iter().map(|(name, _)| *name)));
    let mut rows = Vec::new();
    for &gib in args.sizes_gib() {
        let reports = (0..args.turns()).map(|_| sparse(gib << 30)).collect::<Result<Vec<_>, _>>()?;
        let (line, figures) = row(&[gib.to_string()], &COLUMNS, &reports);
        println!("{line}");
        rows.push(figures);
    }
    Ok(rows)
}

//! Guests with all of their RAM touched, moved between two processes by the `sterna` command.

use serde_json::{Value, json};

use super::arguments::BlackoutArgs;
use super::failure::Failure;
use super::table::{Column, cell, head, row, value};
use crate::convergence::{Demo, Migration};
use crate::peers::statistics::{Spread, percentile};

const COLUMNS: [Column<Migration>; 10] = [
    ("downtime", |migration| migration.downtime_measured.total_ms),
    ("predicted", |migration| migration.downtime_predicted.total_ms),
    ("predicted ÷ measured", |migration| {
        migration.downtime_predicted.total_ms / migration.downtime_measured.total_ms
    }),
    ("pause, save, harvest", |migration| {
        let parts = &migration.downtime_measured;
        parts.pause_ms + parts.save_ms + parts.harvest_ms
    }),
    ("send", |migration| migration.downtime_measured.send_ms),
    ("FINAL to PREPARED", |migration| migration.downtime_measured.transfer_ms),
    ("revoke", revoke),
    ("predicted revoke", |migration| migration.downtime_predicted.revoke_ms),
    ("load, GO to RUNNING", |migration| {
        migration.downtime_measured.load_ms + migration.downtime_measured.start_ms
    }),
    ("downtime less send", less_send),
];

fn revoke(migration: &Migration) -> f64 {
    migration.downtime_measured.revoke_ms
}

fn less_send(migration: &Migration) -> f64 {
    migration.downtime_measured.total_ms - migration.downtime_measured.send_ms
}

pub(super) fn table(args: &BlackoutArgs) -> Result<Value, Failure> {
    let sizes_mib: &[u64] = match &args.memory[..] {
        [] if args.quick => &[256, 1024],
        [] => &[256, 1024, 2048, 4096],
        sizes => sizes,
    };
    let repeat = args.repeat.unwrap_or(if args.quick { 1 } else { 3 });
    let mut migrations: Vec<Vec<Migration>> = sizes_mib.iter().map(|_| Vec::new()).collect();
    // In turn, so that other load on the machine affects all sizes alike. The first migration of each size
    // finds caches cold and does not count.
    for turn in 0..=repeat {
        for (&mib, of_size) in sizes_mib.iter().zip(&mut migrations) {
            let migration = migrate(args, mib)?;
            if turn > 0 {
                of_size.push(migration);
            }
        }
    }
    println!("Idle guests with all of their RAM touched, over {}, two processes, in ms:\n", args.transport);
    println!("{}", head(&["RAM, MiB"], COLUMNS.iter().map(|(name, _)| *name)));
    let mut rows = Vec::new();
    for (mib, of_size) in sizes_mib.iter().zip(&migrations) {
        let (line, figures) = row(&[mib.to_string()], &COLUMNS, of_size);
        println!("{line}");
        rows.push(figures);
    }
    println!();
    let ratios = ratios(sizes_mib, &migrations);
    Ok(json!({ "guests": rows, "ratios": ratios }))
}

fn migrate(args: &BlackoutArgs, mib: u64) -> Result<Migration, Failure> {
    let program = Demo::program(args.sterna.as_deref());
    let common = vec![
        format!("--memory={mib}M"),
        format!("--transport={}", args.transport),
        format!("--lanes={}", args.lanes()),
        "--machine=synthetic".into(),
        "--dirty-rate=0".into(),
        "--verify=off".into(),
        // A limit that every guest meets, so each switches; the prediction is measured all the same.
        "--downtime-limit=10000".into(),
    ];
    let demo = Demo { program, common, temporary: None };
    Ok(demo.migrate(&[])?.ok_or("an idle guest did not converge")?)
}

/// The ratios of the largest guest to the smallest, turn by turn.
fn ratios(sizes_mib: &[u64], migrations: &[Vec<Migration>]) -> Value {
    let of_size = |mib: Option<&u64>| {
        let index = sizes_mib.iter().position(|size| Some(size) == mib)?;
        Some((sizes_mib[index], &migrations[index]))
    };
    let (Some((small, of_small)), Some((large, of_large))) =
        (of_size(sizes_mib.iter().min()), of_size(sizes_mib.iter().max()))
    else {
        return Value::Null;
    };
    let mut object = serde_json::Map::new();
    for (name, of, aim) in
        [("revoke", revoke as fn(&Migration) -> f64, 1.3), ("downtime less send", less_send, 1.2)]
    {
        let turns: Vec<_> =
            of_large.iter().zip(of_small).map(|(large, small)| of(large) / of(small)).collect();
        let spread = Spread::of(&turns);
        println!("{name}, {large} ÷ {small} MiB: {} (aim: at most {aim})", cell(spread));
        object.insert(name.to_owned(), value(spread));
    }
    let errors: Vec<_> = migrations
        .iter()
        .flatten()
        .map(|migration| {
            (migration.downtime_predicted.total_ms / migration.downtime_measured.total_ms - 1.0).abs()
        })
        .collect();
    let within = percentile(&errors, 90);
    println!(
        "predicted and measured downtime: nine tenths of {} migrations within {} (aim: 15 %)",
        migrations.iter().map(Vec::len).sum::<usize>(),
        within.map_or("–".into(), |within| format!("{:.0} %", within * 100.0)),
    );
    object.insert("prediction, 90th percentile".into(), json!(within));
    Value::Object(object)
}

//! `sterna-bench tls`: TCP lanes with TLS beside TCP lanes without, within this machine, in turns.

use std::process::ExitCode;

use clap::Args;
use sterna::trust::{Peer, Rights, Security, TrustStore};

use crate::peers::lanes_within;
use crate::peers::statistics::Spread;

#[derive(Debug, Args)]
pub(crate) struct TlsArgs {
    /// How often everything is measured
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: u8,
    /// Numbers of lanes
    #[arg(long, default_values_t = [1, 4], value_delimiter = ',', value_name = "N,...")]
    lanes: Vec<u8>,
}

type Failure = Box<dyn std::error::Error>;

pub(crate) fn run(args: &TlsArgs) -> ExitCode {
    match measure(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &TlsArgs) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let store = TrustStore::at(&folder.path().join("keys"));
    // Both ends are in this process, and have one key.
    let fingerprint = store.host_key()?.fingerprint();
    store.add(Peer { name: "this-machine".into(), fingerprint, rights: Rights::all() })?;
    let (plain, tls) = (Security::default(), Security::trusting_everywhere(store));
    println!("| lanes | | median | least | greatest |\n|---|---|---|---|---|");
    for &lanes in &args.lanes {
        let mut columns: [Vec<f64>; 6] = Default::default();
        for turn in 0..args.repeat {
            let measure = |security| lanes_within(lanes, security).map_err(|error| error.to_string());
            // In reverse order in every second turn.
            let (without, with) = if turn % 2 == 0 {
                let without = measure(&plain)?;
                (without, measure(&tls)?)
            } else {
                let with = measure(&tls)?;
                (measure(&plain)?, with)
            };
            let values = [without.0, with.0, with.0 / without.0, without.1, with.1, with.1 / without.1];
            columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
        }
        let names = [
            "plain, MB/s",
            "TLS, MB/s",
            "**TLS ÷ plain**",
            "plain, CPU s for each GiB, both ends",
            "TLS, CPU s for each GiB, both ends",
            "**CPU of TLS ÷ of plain**",
        ];
        for (name, column) in names.iter().zip(&columns) {
            let Some(Spread { median, min, max }) = Spread::of(column) else { continue };
            let digits = if median < 10.0 { 2 } else { 0 };
            println!("| {lanes} | {name} | {median:.digits$} | {min:.digits$} | {max:.digits$} |");
        }
    }
    Ok(())
}

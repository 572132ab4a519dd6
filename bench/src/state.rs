//! `sterna-bench state`: what a large saved state adds to the downtime, beside the link's time for it.
//!
//! Whole migrations by the `sterna` command, of a guest without and with this state, in turns with plain TCP
//! streams of as many bytes. With a bandwidth limit the link is the slower of the two.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::convergence::{Demo, Migration};
use crate::peers::plain;
use crate::peers::statistics::Spread;

#[derive(Debug, Args)]
pub(crate) struct StateArgs {
    /// How often everything is measured
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    repeat: u8,
    /// How much state the guest has, in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1024), value_name = "MIB")]
    state: u64,
    /// RAM of the guest
    #[arg(long, default_value = "64M", value_name = "SIZE")]
    memory: String,
    /// The transport of pages: tcp or rdma
    #[arg(long, default_value = "tcp")]
    transport: String,
    /// Have both ends at this address of this machine
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into(), value_name = "ADDRESS")]
    address: IpAddr,
    /// Send no faster than this, in MB/s: a link slower than this machine's own; 0 is no limit
    #[arg(long, default_value_t = 0, value_name = "MB/S")]
    bandwidth_limit: u64,
    /// The `sterna` command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    sterna: Option<PathBuf>,
}

type Failure = Box<dyn std::error::Error>;

pub(crate) fn run(args: &StateArgs) -> ExitCode {
    match measure(args) {
        Ok(measured) => {
            println!("{}", measured.markdown(args));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The measurements, in milliseconds unless a name says otherwise.
#[derive(Default)]
struct Measured {
    plain_mbps: Vec<f64>,
    without: Vec<Migration>,
    with: Vec<Migration>,
    added: Vec<f64>,
    /// The link's time for the state.
    link: Vec<f64>,
}

fn measure(args: &StateArgs) -> Result<Measured, Failure> {
    // Journals cost nothing in this folder.
    let private = fs::Permissions::from_mode(0o700);
    let folder =
        tempfile::Builder::new().prefix("sterna-bench-").permissions(private).tempdir_in("/dev/shm")?;
    let demo = Demo {
        program: Demo::program(args.sterna.as_deref()),
        common: vec![
            format!("--memory={}", args.memory),
            format!("--transport={}", args.transport),
            format!("--address={}", args.address),
            format!("--bandwidth-limit={}", args.bandwidth_limit),
            "--dirty-rate=5".into(),
            "--machine=synthetic".into(),
            "--verify=off".into(),
            // The measurement must not depend on the prediction.
            "--downtime-limit=600000".into(),
        ],
        temporary: Some(folder.path().to_owned()),
    };
    let migrate = |state: u64| -> Result<Migration, Failure> {
        let migration = demo.migrate(&[format!("--device-state={state}M")])?;
        migration.ok_or_else(|| "an idle guest did not converge".into())
    };
    let bytes = args.state << 20;
    let mut measured = Measured::default();
    for _ in 0..args.repeat {
        let plain_mbps = plain::speed(args.address, 1, bytes, 1)?;
        let (without, with) = (migrate(0)?, migrate(args.state)?);
        let link_mbps = match args.bandwidth_limit {
            0 => plain_mbps,
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            limit => plain_mbps.min(limit as f64),
        };
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        measured.link.push(bytes as f64 / 1e3 / link_mbps);
        measured.plain_mbps.push(plain_mbps);
        measured.added.push(with.downtime_ms - without.downtime_ms);
        measured.without.push(without);
        measured.with.push(with);
    }
    Ok(measured)
}

impl Measured {
    fn markdown(&self, args: &StateArgs) -> String {
        let of = |migrations: &[Migration], figure: fn(&Migration) -> f64| {
            migrations.iter().map(figure).collect::<Vec<_>>()
        };
        let with = |figure| of(&self.with, figure);
        let ratios: Vec<_> = self.added.iter().zip(&self.link).map(|(added, link)| added / link).collect();
        let state = args.state;
        let rows = [
            ("plain TCP, one stream, MB/s".to_owned(), self.plain_mbps.clone()),
            (format!("{state} MiB over the link, ms"), self.link.clone()),
            ("downtime without that state, ms".into(), of(&self.without, |it| it.downtime_ms)),
            (format!("downtime with {state} MiB of state, ms"), with(|it| it.downtime_ms)),
            ("of that: save, which the state travels beside".into(), with(|it| it.downtime_measured.save_ms)),
            ("of that: the last round".into(), with(|it| it.downtime_measured.send_ms)),
            ("of that: FINAL to PREPARED".into(), with(|it| it.downtime_measured.transfer_ms)),
            ("of that: load, which looks at every byte".into(), with(|it| it.downtime_measured.load_ms)),
            ("predicted downtime ÷ measured".into(), with(|it| predicted_ms(it) / it.downtime_ms)),
            ("**added downtime ÷ state over the link**".into(), ratios),
        ];
        let mut text = "| | median | least | greatest |\n|---|---|---|---|".to_owned();
        for (name, values) in rows {
            let cells =
                Spread::of(&values).map_or("– | – | –".into(), |Spread { median, min, max }| {
                    let digits = if median < 10.0 { 2 } else { 1 };
                    format!("{median:.digits$} | {min:.digits$} | {max:.digits$}")
                });
            text += &format!("\n| {name} | {cells} |");
        }
        text
    }
}

/// The sum of the predicted parts, except for comparing.
fn predicted_ms(migration: &Migration) -> f64 {
    let parts = &migration.downtime_predicted;
    [
        parts.pause_ms,
        parts.save_ms,
        parts.harvest_ms,
        parts.send_ms,
        parts.transfer_ms,
        parts.revoke_ms,
        parts.load_ms,
        parts.start_ms,
    ]
    .iter()
    .sum()
}

//! Whether migrations converge, and whether their predictions come true: whole migrations by the `sterna`
//! command, over a link that a bandwidth limit simulates. The limit of each figure is the link, in the same
//! run.
//!
//! | figure | compared with |
//! |---|---|
//! | [`pace`](figures::pace) | pages a second against the bandwidth limit, and against no limit |
//! | [`prediction`](figures::prediction) | predicted against measured downtime, over guests of many rates |
//! | [`shares`](figures::shares) | guests at 0.5 to 0.85 of the link: convergence; cost against the ideal |
//! | [`slowdown`](figures::slowdown) | the guest's heartbeat in each round against that before |
//! | [`throttle`] | a quota of pages against a share of the time, by what each vCPU does |
//! | [`tournament`] | policies against each other and against an optimum, by simulation |

mod error;
mod figures;
mod migration;
mod throttle;
mod tournament;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use self::error::BenchError;
pub(crate) use self::migration::{Demo, Migration};
use self::tournament::TournamentArgs;

/// The figures to measure, and their parameters.
#[derive(Debug, Args)]
pub(crate) struct ConvergenceArgs {
    /// The figures to take [default: all]
    #[arg(value_enum)]
    figures: Vec<Figure>,
    /// The `sterna` command [default: the one beside this program]
    #[arg(long)]
    sterna: Option<PathBuf>,
    /// The link's rate, in MB/s
    #[arg(long, default_value_t = 100)]
    link: u64,
    /// RAM of the guests, all of which they write
    #[arg(long, default_value = "64M")]
    memory: String,
    /// The guests' machine: kvm or synthetic
    #[arg(long, default_value = "auto")]
    machine: String,
    /// The transport of pages: tcp or rdma
    #[arg(long, default_value = "tcp")]
    transport: String,
    #[command(flatten)]
    tournament: TournamentArgs,
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Figure {
    /// The accuracy of a bandwidth limit
    RateLimiter,
    /// Predicted against measured downtime
    Prediction,
    /// Guests at shares of the link's bandwidth
    Shares,
    /// The guest's heartbeat, round by round
    Slowdown,
    /// A quota of pages beside a share of the guest's time
    Throttle,
    /// Policies against each other, by simulation; only if it is named
    Tournament,
}

pub(crate) fn run(args: &ConvergenceArgs) -> ExitCode {
    match take(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the figures and prints them, up to the first migration that fails unexpectedly.
fn take(args: &ConvergenceArgs) -> Result<(), BenchError> {
    if args.figures.contains(&Figure::Tournament) {
        tournament::run(&args.tournament)?;
        if args.figures.len() == 1 {
            return Ok(());
        }
    }
    let demo = Demo {
        program: Demo::program(args.sterna.as_deref()),
        common: vec![
            format!("--memory={}", args.memory),
            format!("--machine={}", args.machine),
            format!("--transport={}", args.transport),
            "--verify=off".into(),
        ],
        temporary: None,
    };
    let wanted = |figure| args.figures.is_empty() || args.figures.contains(&figure);
    println!(
        "{} guests of {}, a link of {} MB/s over {}\n",
        args.machine, args.memory, args.link, args.transport
    );
    if wanted(Figure::RateLimiter) {
        figures::pace(&demo, args.link)?;
    }
    if wanted(Figure::Shares) {
        figures::shares(&demo, args.link)?;
    }
    if wanted(Figure::Slowdown) {
        figures::slowdown(&demo, args.link)?;
    }
    if wanted(Figure::Throttle) {
        throttle::run()?;
    }
    if wanted(Figure::Prediction) {
        figures::prediction(&demo, args.link)?;
    }
    Ok(())
}

//! `sterna-bench peers`: whole migrations and raw throughput, beside the limit and beside others, in one run.

mod peers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Sterna beside its limit and beside others.
#[derive(Debug, Parser)]
#[command(name = "sterna-bench", version, max_term_width = 110)]
struct SternaBench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Hold Sterna against ib_write_bw, iperf3 and QEMU, interleaved in one run on this machine
    Peers(peers::PeersArgs),
}

fn main() -> ExitCode {
    match SternaBench::parse().command {
        Command::Peers(args) => peers::run(&args),
    }
}

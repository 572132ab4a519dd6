//! Sterna beside its limits and beside others: figures that take a program of their own.

mod blackout;
mod convergence;
mod dirty_log;
mod downtime;
mod peers;
mod scan;
mod state;

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
    /// Find the dirty pages of 1 GiB to 4 TiB of RAM, beside a plain read and beside plainer ways
    Scan(scan::ScanArgs),
    /// Hold KVM's dirty rings against its dirty bitmap, for guests that write little and much
    DirtyLog(dirty_log::DirtyLogArgs),
    /// See whether migrations converge, and whether what they predict comes true
    Convergence(convergence::ConvergenceArgs),
    /// See what the blackout is made of, and whether it grows with the guest's RAM
    Blackout(blackout::BlackoutArgs),
    /// See what journals and comparing memory add to the downtime, and where its milliseconds go
    Downtime(downtime::DowntimeArgs),
    /// See what a long saved state adds to the downtime, beside what the link needs for it
    State(state::StateArgs),
}

fn main() -> ExitCode {
    match SternaBench::parse().command {
        Command::Peers(args) => peers::run(&args),
        Command::Scan(args) => scan::run(&args),
        Command::DirtyLog(args) => dirty_log::run(&args),
        Command::Convergence(args) => convergence::run(&args),
        Command::Blackout(args) => blackout::run(&args),
        Command::Downtime(args) => downtime::run(&args),
        Command::State(args) => state::run(&args),
    }
}

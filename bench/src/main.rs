//! Sterna beside its limits and beside other programs: figures that need a program of their own.

mod blackout;
mod convergence;
mod dirty_log;
mod downtime;
mod peers;
mod scan;
mod state;
mod tls;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Sterna beside its limit and beside other programs.
#[derive(Debug, Parser)]
#[command(name = "sterna-bench", version, max_term_width = 110)]
struct SternaBench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare Sterna with ib_write_bw, iperf3 and QEMU, interleaved in one run on this machine
    Peers(peers::PeersArgs),
    /// Find the dirty pages of 1 GiB to 4 TiB of RAM, beside a plain read and plainer ways
    Scan(scan::ScanArgs),
    /// Compare KVM's dirty rings with its dirty bitmap, for guests that write little and much
    DirtyLog(dirty_log::DirtyLogArgs),
    /// Check whether migrations converge, and whether their predictions come true
    Convergence(convergence::ConvergenceArgs),
    /// Show the parts of the blackout, and whether it grows with the guest's RAM
    Blackout(blackout::BlackoutArgs),
    /// Show what journals and comparing memory add to the downtime, by its parts
    Downtime(downtime::DowntimeArgs),
    /// Show what a large saved state adds to the downtime, beside the link's time for it
    State(state::StateArgs),
    /// Compare TCP lanes with TLS to those without
    Tls(tls::TlsArgs),
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
        Command::Tls(args) => tls::run(&args),
    }
}

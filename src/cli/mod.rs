//! The command: one file a subcommand.
//!
//! | file | |
//! |---|---|
//! | `run`, `adopt`, `receive` | those that hold a guest: new, of a running QEMU, arriving |
//! | `migrate` | asks the process that holds a guest to move it, and shows the progress |
//! | `cancel` | ends a running migration |
//! | `list` | the guests of this host |
//! | `recover` | reports on a guest after a migration that went wrong, and settles what it can |
//! | `dirty_rate` | samples a guest's writes, and predicts how it would move |
//! | `send` | moves a file to a `receive` that waits for one |
//! | `demo` | everything at once: two processes, a guest, a migration, and its result |
//! | `trust`, `security` | this host's key and the hosts that it trusts; options of all connections |
//! | `check`, `soft_roce` | this machine's abilities, and a soft-RoCE device where RDMA is missing |
//! | `machine`, `qemu` | the adapters from `sterna-vmm` and `sterna-qemu` to the engine's `Guest` |
//! | `ended` | how the holding of a guest ended |
//! | `held` | what the process of a guest needs of the guest, whichever VMM runs it |
//! | `vm_process`, `incoming` | the holder of a guest, which answers for it; a guest on its way |
//! | `server`, `socket`, `protocol` | the control socket of a guest's process: server, client, messages |
//! | `progress` | a migration's events, for all clients that watch it |
//! | `signals` | the effect of SIGHUP, SIGINT and SIGTERM on a process that holds a guest |
//! | `lanes` | the transport of pages: the same options for guests and files |
//! | `state` | the folder of this host's guest state |
//! | `output`, `exit`, `port`, `size` | printing, exit codes, ports, sizes |

mod adopt;
mod cancel;
mod check;
mod contact;
mod demo;
mod device_state;
mod dirty_log;
mod dirty_rate;
mod ended;
mod exit;
mod held;
mod hints;
mod incoming;
mod lanes;
mod left_qemu;
mod limits;
mod list;
mod machine;
mod migrate;
mod output;
mod port;
mod preflight;
mod progress;
mod protocol;
mod qemu;
mod receive;
mod recover;
mod run;
mod security;
mod send;
mod server;
mod signals;
mod size;
mod socket;
mod soft_roce;
mod state;
mod trust;
mod vm_process;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use self::exit::Exit;
use self::signals::Stage;

/// Moves running KVM guests between hosts: by one-sided RDMA writes, or over TCP without RDMA.
#[derive(Debug, Parser)]
#[command(name = "sterna", version, max_term_width = 110, after_help = exit::HELP)]
struct Sterna {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a guest, and hold it until it is stopped or has moved
    Run(run::RunArgs),
    /// Hold a guest of a running QEMU, so that it can be moved
    Adopt(adopt::AdoptArgs),
    /// Wait for a guest and hold it; or, with --into, wait for a file
    Receive(receive::ReceiveArgs),
    /// Move a guest to another host
    Migrate(migrate::MigrateArgs),
    /// End a running migration, unless the guest is already being given away
    Cancel(cancel::CancelArgs),
    /// List the guests of this host, running and arriving
    List(list::ListArgs),
    /// Report on a guest after a migration that went wrong, and settle what can be settled
    Recover(recover::RecoverArgs),
    /// Sample how fast a guest writes its memory, and report whether and how it would move
    DirtyRate(dirty_rate::DirtyRateArgs),
    /// Move a memory image or any large file to another host
    Send(send::SendArgs),
    /// Show a migration: two processes on this machine, and a guest that moves from one to the other
    Demo(demo::DemoArgs),
    /// Show this host's key, and change which hosts it trusts
    Trust(trust::TrustCommand),
    /// Check whether this machine can migrate guests, and name a remedy for each problem
    Check(check::CheckArgs),
    /// Make or remove a soft-RoCE device: RDMA on an ordinary network interface
    SoftRoce(soft_roce::SoftRoceArgs),
}

pub(crate) fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("STERNA_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| output::Log)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    let command = match Sterna::try_parse() {
        Ok(sterna) => sterna.command,
        Err(text) => {
            // Prints the help or the mistake; unlike `parse`, this does not exit on an error of the stream.
            let _ = text.print();
            return if text.use_stderr() { Exit::Usage } else { Exit::Done }.into();
        }
    };
    report_panics();
    if let Some(stage) = command.first_stage() {
        output::never_wait();
        signals::catch(stage);
    }
    let code = never_101(|| command.run());
    output::flush();
    code
}

impl Command {
    /// The guest's first stage, for the commands that hold a guest.
    fn first_stage(&self) -> Option<Stage> {
        match self {
            Command::Run(_) | Command::Adopt(_) => Some(Stage::Starting),
            Command::Receive(_) => Some(Stage::Empty),
            _ => None,
        }
    }

    fn run(&self) -> ExitCode {
        match self {
            Command::Run(args) => run::run(args),
            Command::Adopt(args) => adopt::run(args),
            Command::Receive(args) => receive::run(args),
            Command::Migrate(args) => migrate::run(args),
            Command::Cancel(args) => cancel::run(args),
            Command::List(args) => list::run(args),
            Command::Recover(args) => recover::run(args),
            Command::DirtyRate(args) => dirty_rate::run(args),
            Command::Send(args) => send::run(args),
            Command::Demo(args) => demo::run(args),
            Command::Trust(args) => trust::run(args),
            Command::Check(args) => check::run(args),
            Command::SoftRoce(args) => soft_roce::run(args),
        }
    }
}

/// Ends a command that panics with a meaningful exit code.
fn never_101(command: impl FnOnce() -> ExitCode) -> ExitCode {
    panic::catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| Exit::Failed.into())
}

/// Reports panics of all threads where errors go.
fn report_panics() {
    panic::set_hook(Box::new(|panic| {
        output::errln!("error: {panic}\nThis is a bug in Sterna; please report it with these lines");
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            output::errln!("{backtrace}");
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_a_command_with_a_code_that_is_documented() {
        let code = never_101(|| panic!("a fault that a test makes"));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(10)));
    }
}

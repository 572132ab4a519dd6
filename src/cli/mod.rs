//! The command: one file a subcommand.
//!
//! | file | |
//! |---|---|
//! | `run`, `receive` | the two that hold a guest: a fresh one, and one that arrives |
//! | `migrate` | asks the process that holds a guest to move it, and shows how that goes |
//! | `cancel` | ends a migration that is under way |
//! | `recover` | what is known of a guest after a migration that went wrong, and what settles it |
//! | `dirty_rate` | samples a guest's writes, and predicts how it would move |
//! | `send` | moves a file to a `receive` that waits for one |
//! | `demo` | all of it at once: two processes, a guest, a migration, and what came of it |
//! | `check`, `soft_roce` | what this machine has, and a soft-RoCE device where it has none |
//! | `machine` | the adapter from `sterna-vmm` to the engine's `Guest` |
//! | `vm_process`, `arriving` | who has a guest in hand, and answers for it |
//! | `server`, `socket`, `protocol` | the control socket of a process that holds a guest: its server, its client, its words |
//! | `progress` | how a migration goes, for all who watch it |
//! | `signals` | what SIGHUP, SIGINT and SIGTERM mean to a process that holds a guest |
//! | `lanes` | how pages travel: the same options for guests and files |
//! | `state` | where this host keeps the state of its guests |
//! | `output`, `exit`, `size` | how things are printed, what exit codes mean, how sizes are written |

mod cancel;
mod check;
mod demo;
mod device_state;
mod dirty_log;
mod dirty_rate;
mod exit;
mod hints;
mod incoming;
mod lanes;
mod machine;
mod migrate;
mod output;
mod progress;
mod protocol;
mod receive;
mod recover;
mod run;
mod send;
mod server;
mod signals;
mod size;
mod socket;
mod soft_roce;
mod state;
mod vm_process;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use self::exit::Exit;
use self::signals::Stage;

/// The port at which a destination listens unless told otherwise.
pub(crate) const DEFAULT_PORT: u16 = 7837;

/// Moves running KVM guests between hosts: by one-sided RDMA writes, or over TCP where there is no RDMA.
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
    /// Wait for a guest to arrive, and hold it then; or, with --into, for a file
    Receive(receive::ReceiveArgs),
    /// Move a guest to another host
    Migrate(migrate::MigrateArgs),
    /// End a migration that is under way, unless the guest is being given away already
    Cancel(cancel::CancelArgs),
    /// Say what became of a guest whose migration went wrong, and settle what can be settled
    Recover(recover::RecoverArgs),
    /// Sample how fast a guest writes its memory, and say whether and how it would move
    DirtyRate(dirty_rate::DirtyRateArgs),
    /// Move a memory image or any large file to another host
    Send(send::SendArgs),
    /// Show it: two processes on this machine, and a guest that moves from one to the other
    Demo(demo::DemoArgs),
    /// Say what this machine has for migrations, and what mends what it lacks
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
            // Help, or what is wrong; unlike `parse`, this leaves an error of the stream to us.
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
    /// Where the guest is at first, of the commands that hold one.
    fn first_stage(&self) -> Option<Stage> {
        match self {
            Command::Run(_) => Some(Stage::Starting),
            Command::Receive(_) => Some(Stage::Empty),
            _ => None,
        }
    }

    fn run(&self) -> ExitCode {
        match self {
            Command::Run(args) => run::run(args),
            Command::Receive(args) => receive::run(args),
            Command::Migrate(args) => migrate::run(args),
            Command::Cancel(args) => cancel::run(args),
            Command::Recover(args) => recover::run(args),
            Command::DirtyRate(args) => dirty_rate::run(args),
            Command::Send(args) => send::run(args),
            Command::Demo(args) => demo::run(args),
            Command::Check(args) => check::run(args),
            Command::SoftRoce(args) => soft_roce::run(args),
        }
    }
}

/// Ends a command that panics with an exit code that means something.
fn never_101(command: impl FnOnce() -> ExitCode) -> ExitCode {
    panic::catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| Exit::Failed.into())
}

/// Has panics of any thread go where all errors go.
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

//! `sterna migrate`: asks for a guest's migration, and shows its progress.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use sterna::progress::{Event, Report};
use sterna::source::Verify;

use super::exit::Exit;
use super::lanes::LaneArgs;
use super::limits::{self, LimitArgs};
use super::output::{self, errln, outln};
use super::port::with_port;
use super::protocol::{Answer, Failure, Move, Request};
use super::security::SecurityArgs;
use super::size::Size;
use super::socket::{self, Client, SocketError, ask};

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Name of the guest
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// Destination: a host on which `sterna receive` runs
    #[arg(long, value_name = "HOST[:PORT]", required_unless_present_any = ["set", "watch"])]
    to: Option<String>,
    /// Change a limit of a running migration, by the name of its option; may be given more than once, but
    /// with no other option than --json
    #[arg(long, value_name = "LIMIT=VALUE", conflicts_with_all = ["to", "verify", "state_max", "LaneArgs", "trust_dir", "insecure", "encrypt", "LimitArgs"])]
    set: Vec<String>,
    /// Show the progress of a running migration, and exit as the command that began it. Ctrl-C ends only the
    /// watching
    #[arg(long, conflicts_with_all = ["to", "set", "verify", "LaneArgs", "trust_dir", "insecure", "encrypt", "LimitArgs"])]
    watch: bool,
    #[command(flatten)]
    how: MoveArgs,
    /// How much of the guest's memory both ends compare
    #[arg(long, value_enum, value_name = "HOW", default_value_t = VerifyChoice::Off)]
    verify: VerifyChoice,
    /// Print the report as one JSON object, as the last line
    #[arg(long)]
    json: bool,
}

/// The options of a migration.
#[derive(Clone, Debug, Args)]
pub(crate) struct MoveArgs {
    #[command(flatten)]
    pub(crate) lanes: LaneArgs,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Send at most this much state of vCPUs and devices, during which the guest is paused [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) state_max: Option<Size>,
}

/// How much of the memory is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum VerifyChoice {
    /// Nothing: the wire's checksums protect the pages, and hashing costs CPU at both ends
    Off,
    /// All memory, mostly while the guest still runs
    Final,
    /// All memory, while the guest is paused
    Full,
}

impl From<VerifyChoice> for Verify {
    fn from(choice: VerifyChoice) -> Self {
        match choice {
            VerifyChoice::Off => Self::Off,
            VerifyChoice::Final => Self::Final,
            VerifyChoice::Full => Self::Full,
        }
    }
}

impl MoveArgs {
    pub(crate) fn request(&self, to: String, verify: VerifyChoice) -> Result<Move, String> {
        self.lanes.check(&self.security)?;
        Ok(Move {
            to,
            lanes: self.lanes.clone(),
            security: self.security.resolved()?,
            limits: self.limits.clone(),
            state_max_bytes: self.state_max.map(|size| size.0),
            verify: verify.into(),
        })
    }
}

pub(crate) fn run(args: &MigrateArgs) -> ExitCode {
    let (result, signal) = match &args.to {
        Some(to) => {
            args.how.security.trust.warn();
            let request = match args.how.request(with_port(to), args.verify) {
                Ok(request) => request,
                Err(error) => return output::error(Exit::Usage, error),
            };
            let signal = cancel_on_signal(&args.name);
            (move_guest(&args.name, request, &mut output::progress), signal)
        }
        None if args.watch => (follow(&args.name, &Request::Watch, &mut output::progress), Arc::default()),
        None => return set(args),
    };
    match result {
        Ok(report) => {
            let to = args.to.as_deref().unwrap_or("the destination");
            outln!("{} runs at {to} now", args.name);
            output::print_lines(&output::summary(&report));
            if args.json {
                outln!("{}", serde_json::Value::Object(output::json(&report, 0)));
            }
            Exit::Done.into()
        }
        Err(mut failure) => {
            if failure.exit == Exit::Cancelled && signal.load(Ordering::Relaxed) == SIGTERM {
                failure.exit = Exit::Terminated;
            }
            let code = output::failed(&failure);
            if args.json {
                outln!("{}", output::json_failure(&failure));
            }
            code
        }
    }
}

/// `--set`: changes the limits of a running migration.
fn set(args: &MigrateArgs) -> ExitCode {
    let limits = match LimitArgs::of_settings(&args.set) {
        Ok(limits) => limits,
        Err(what) => return output::error(Exit::Usage, what),
    };
    match ask(&args.name, &Request::SetLimits(limits)) {
        Ok(Answer::Limits(limits)) => {
            if args.json {
                outln!("{}", serde_json::json!({ "status": "set", "limits": limits }));
            } else {
                outln!("{}: {}", args.name, limits::line(&limits));
            }
            Exit::Done.into()
        }
        Ok(Answer::Failed(failure)) => output::failed(&failure),
        Ok(other) => output::error(Exit::Failed, format!("{} answered {other:?}", args.name)),
        Err(error) => output::error(Exit::Failed, error),
    }
}

/// Asks the holder of a guest to move it, and reports the progress.
pub(crate) fn move_guest(
    name: &str,
    request: Move,
    progress: &mut dyn FnMut(&Event),
) -> Result<Report, Failure> {
    follow(name, &Request::Migrate(Box::new(request)), progress)
}

/// Reports the holder's answers while it moves a guest.
fn follow(name: &str, request: &Request, progress: &mut dyn FnMut(&Event)) -> Result<Report, Failure> {
    let here = |error: SocketError, guest: &str| Failure {
        exit: Exit::Refused,
        what: error.to_string(),
        guest: guest.to_owned(),
        code: None,
    };
    let mut client = Client::connect(name)
        .map_err(|error| here(error, "the guest is not on this host under that name"))?;
    client
        .ask(request)
        .map_err(|error| here(error, "at the source, as it was, if the process that holds it is alive"))?;
    loop {
        match client.answer() {
            Ok(Answer::Progress(event)) => progress(&event),
            Ok(Answer::Moved(report)) => return Ok(*report),
            Ok(Answer::Failed(failure)) => return Err(failure),
            Ok(_) => {}
            Err(error) => {
                return Err(Failure {
                    exit: Exit::InDoubt,
                    what: error.to_string(),
                    guest: "in doubt: the process that held the guest is gone; see whether it runs at the destination"
                        .into(),
                    code: None,
                });
            }
        }
    }
}

/// On Ctrl-C or SIGTERM asks to end the migration; the command still awaits its outcome. Returns the signal.
fn cancel_on_signal(name: &str) -> Arc<AtomicI32> {
    let signal = Arc::new(AtomicI32::new(0));
    match Signals::new([SIGINT, SIGTERM]) {
        Ok(mut signals) => {
            let (name, signal) = (name.to_owned(), signal.clone());
            thread::spawn(move || {
                for came in signals.forever() {
                    signal.store(came, Ordering::Relaxed);
                    errln!("cancelling ...");
                    match ask(&name, &Request::Cancel) {
                        Ok(Answer::Failed(failure)) => errln!("not cancelled: {}", failure.what),
                        Ok(_) => {}
                        Err(error) => errln!("not cancelled: {error}"),
                    }
                }
            });
        }
        Err(error) => tracing::warn!("signals cannot be caught, so they will not cancel: {error}"),
    }
    signal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_changes_limits_is_told_of_options_that_would_be_ignored() {
        let command = MigrateArgs::augment_args(clap::Command::new("migrate"));
        let longs = command.get_arguments().filter_map(|argument| Some((argument.get_long()?, argument)));
        for (name, argument) in longs.filter(|(name, _)| !["set", "json"].contains(name)) {
            let value = if argument.get_action().takes_values() { "=1" } else { "" };
            let value = match name {
                "transport" => "=tcp",
                "if-stuck" => "=stop",
                "verify" => "=full",
                "encrypt" => "=control",
                _ => value,
            };
            let words =
                ["migrate", "tern", "--set=max-rounds=9", &format!("--{name}{value}")].map(str::to_owned);
            let error = command.clone().try_get_matches_from(words).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{error}");
        }
        let words = ["migrate", "tern", "--set=max-rounds=9", "--set", "timeout=3", "--json"];
        command.try_get_matches_from(words).unwrap();
    }
}

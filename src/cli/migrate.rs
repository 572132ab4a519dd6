//! `sterna migrate`: has a guest moved, and shows how that goes.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use sterna::progress::{Event, Report};

use super::exit::Exit;
use super::protocol::{Answer, Failure, Move, Request, Transport};
use super::socket::{self, Client, SocketError, ask};
use super::{DEFAULT_PORT, output};

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Name of the guest
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// Where to: a host on which `sterna receive` runs
    #[arg(long, value_name = "HOST[:PORT]")]
    to: String,
    #[command(flatten)]
    how: MoveArgs,
    /// Have both ends compare all memory at the switch; the guest stands still meanwhile
    #[arg(long)]
    compare: bool,
    /// Print the report as JSON, one object, as the last line
    #[arg(long)]
    json: bool,
}

/// How a migration is to be done.
#[derive(Clone, Debug, Args)]
pub(crate) struct MoveArgs {
    /// How the pages travel
    #[arg(long, value_enum, default_value_t)]
    pub(crate) transport: Transport,
    /// How many lanes (queue pairs or TCP streams) [default: by the number of processors]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) lanes: Option<u8>,
    /// How long the guest may stand still at the switch, in ms
    #[arg(long, default_value_t = 300, value_name = "MS")]
    pub(crate) downtime_limit: u64,
    /// Give up after so many rounds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub(crate) max_rounds: u32,
    /// Slow the guest by up to so many percent when the rounds do not get smaller; 0 never does
    #[arg(long, default_value_t = 99, value_parser = clap::value_parser!(u8).range(0..=99), value_name = "PERCENT")]
    pub(crate) throttle_max: u8,
}

impl MoveArgs {
    pub(crate) fn request(&self, to: String, compare: bool) -> Move {
        Move {
            to,
            transport: self.transport,
            lanes: self.lanes,
            downtime_limit_ms: self.downtime_limit,
            rounds_max: self.max_rounds,
            throttle_max_percent: self.throttle_max,
            compare,
        }
    }
}

pub(crate) fn run(args: &MigrateArgs) -> ExitCode {
    let request = args.how.request(with_port(&args.to), args.compare);
    let signal = cancel_on_signal(&args.name);
    let result = move_guest(&args.name, request, &mut output::progress);
    match result {
        Ok(report) => {
            println!("{} runs at {} now", args.name, args.to);
            output::print_lines(&output::summary(&report));
            if args.json {
                println!("{}", serde_json::Value::Object(output::json(&report, 0)));
            }
            Exit::Done.into()
        }
        Err(mut failure) => {
            if failure.exit == Exit::Cancelled && signal.load(Ordering::Relaxed) == SIGTERM {
                failure.exit = Exit::Terminated;
            }
            let code = output::failed(&failure);
            if args.json {
                println!("{}", output::json_failure(&failure));
            }
            code
        }
    }
}

/// Asks the holder of a guest to move it, and tells what happens meanwhile.
pub(crate) fn move_guest(
    name: &str,
    request: Move,
    progress: &mut dyn FnMut(&Event),
) -> Result<Report, Failure> {
    let here = |error: SocketError, guest: &str| Failure {
        exit: Exit::Refused,
        what: error.to_string(),
        guest: guest.to_owned(),
    };
    let mut client = Client::connect(name)
        .map_err(|error| here(error, "the guest is not on this host under that name"))?;
    client.ask(&Request::Migrate(request)).map_err(|error| here(error, "the guest is at the source"))?;
    loop {
        match client.answer() {
            Ok(Answer::Progress(event)) => progress(&event),
            Ok(Answer::Moved(report)) => return Ok(report),
            Ok(Answer::Failed(failure)) => return Err(failure),
            Ok(_) => {}
            Err(error) => {
                return Err(Failure {
                    exit: Exit::InDoubt,
                    what: error.to_string(),
                    guest: "in doubt: the process that held the guest is gone; see whether it runs at the destination"
                        .into(),
                });
            }
        }
    }
}

/// `HOST` as `HOST:PORT`; an IPv6 address may stand in brackets or bare.
pub(crate) fn with_port(to: &str) -> String {
    match to.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => format!("{host}:{port}"),
        Some(_) if !to.ends_with(']') => format!("[{to}]:{DEFAULT_PORT}"),
        _ => format!("{to}:{DEFAULT_PORT}"),
    }
}

/// On Ctrl-C or SIGTERM asks for the migration's end; its outcome is awaited all the same. Returns which signal came.
fn cancel_on_signal(name: &str) -> Arc<AtomicI32> {
    let signal = Arc::new(AtomicI32::new(0));
    match Signals::new([SIGINT, SIGTERM]) {
        Ok(mut signals) => {
            let (name, signal) = (name.to_owned(), signal.clone());
            thread::spawn(move || {
                for came in signals.forever() {
                    signal.store(came, Ordering::Relaxed);
                    eprintln!("cancelling ...");
                    match ask(&name, &Request::Cancel) {
                        Ok(Answer::Failed(failure)) => eprintln!("not cancelled: {}", failure.what),
                        Ok(_) => {}
                        Err(error) => eprintln!("not cancelled: {error}"),
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
    fn a_port_is_added_where_none_is_given() {
        for (given, full) in [
            ("host", "host:7837"),
            ("host:1", "host:1"),
            ("10.0.0.1", "10.0.0.1:7837"),
            ("fe80::1", "[fe80::1]:7837"),
            ("[fe80::1]", "[fe80::1]:7837"),
            ("[fe80::1]:9", "[fe80::1]:9"),
        ] {
            assert_eq!(with_port(given), full);
        }
    }
}

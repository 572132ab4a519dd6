//! `sterna recover`: what is known of a guest after a migration that went wrong, and what settles it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use sterna::destination;
use sterna::handover::{Journal, Mark, Record, Side};
use sterna::journal::{Journals, JournalsError};
use sterna::lock::Lock;
use sterna::source::{Doubt, OpenError, Verdict};

use super::exit::Exit;
use super::output::{self, outln};
use super::protocol::{Answer, Found, Request};
use super::socket::{self, SocketError, ask};
use super::state::StateArgs;

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// Name of the guest, here
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// Run the guest on here, its source, although the destination does not say what became of it
    #[arg(long, requires = "other_host_is_fenced", conflicts_with = "run_destination")]
    resume_source: bool,
    /// Run the guest here, its destination, which is ready and has lost the source
    #[arg(long, requires = "other_host_is_fenced")]
    run_destination: bool,
    /// Your word that the other host is off, or can reach neither the guest's disks nor its network, and stays so until it was
    /// restarted. If it is not true, the guest runs twice
    #[arg(long)]
    other_host_is_fenced: bool,
    #[command(flatten)]
    state: StateArgs,
    /// The guest's lock, where its process here has ended: who has that elsewhere may run it
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Print it as JSON, one object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &RecoverArgs) -> ExitCode {
    match recover(args) {
        Ok(report) => report.print(args),
        Err(error) => output::error(Exit::Refused, error),
    }
}

/// What there is to say.
struct Report {
    journals: Vec<(Side, Journal)>,
    found: Found,
}

fn recover(args: &RecoverArgs) -> Result<Report, String> {
    let journals = args.state.journals()?;
    let request =
        Request::Recover { resume_source: args.resume_source, run_destination: args.run_destination };
    let deadline = Instant::now() + ENDS_WITHIN;
    let found = loop {
        // A process that is just ending breaks off, and may have its journals a little longer: what it leaves tells.
        let ending = match ask(&args.name, &request) {
            Ok(Answer::Found(found)) => break found,
            Ok(Answer::Failed(failure)) => break Found { exit: failure.exit, what: failure.what },
            Ok(other) => return Err(format!("{} answered {other:?}", args.name)),
            Err(error @ SocketError::Broken(_)) => error.to_string(),
            Err(SocketError::NoGuest { .. }) => match without_process(&journals, args) {
                Ok(found) => break found,
                Err(error @ OpenError::Journal(JournalsError::InUse(_))) => error.to_string(),
                Err(error) => return Err(error.to_string()),
            },
            Err(error) => return Err(error.to_string()),
        };
        if Instant::now() >= deadline {
            return Err(ending);
        }
        thread::sleep(NAP);
    };
    // As they are now, after what was settled.
    let look = |side| {
        let journal = journals.look(&args.name, side).map_err(|error| error.to_string())?;
        Ok(journal.filter(|journal| journal.last().is_some()).map(|journal| (side, journal)))
    };
    let sides = [Side::Source, Side::Destination].map(look);
    let journals = sides.into_iter().filter_map(Result::transpose).collect::<Result<_, String>>()?;
    Ok(Report { journals, found })
}

/// No process here holds the guest: all that is left of it are journals.
fn without_process(journals: &Journals, args: &RecoverArgs) -> Result<Found, OpenError> {
    let found = |exit, what: String| Ok(Found { exit, what });
    if args.run_destination {
        return found(
            Exit::Refused,
            "is not held here, ready to run: there is nothing to give a word for".into(),
        );
    }
    if let Some(mut doubt) = Doubt::recover(journals, &args.name, args.lock.as_ref().map(Lock::at))? {
        return Ok(settle_doubt(&mut doubt, args.resume_source));
    }
    let last = |side| Ok(journals.look(&args.name, side)?.and_then(|journal| journal.last().cloned()));
    let there: Option<Record> = destination::settle(journals, &args.name)?;
    let here: Option<Record> = last(Side::Source).map_err(|error: JournalsError| error)?;
    match (here.map(|record| (record.mark, record.peer)), there.map(|record| (record.mark, record.peer))) {
        (Some((Mark::Done, peer)), _) => {
            found(Exit::Done, format!("has moved from here to {peer}, and runs there, or has run there"))
        }
        (_, Some((Mark::Running, peer))) => found(
            Exit::Lost,
            format!(
                "has run here since it came from {peer}, and its process has ended. It must not be resumed at its source, \
                 but may be started anew, on one host"
            ),
        ),
        (_, Some((Mark::Refused, peer))) => {
            found(Exit::Failed, format!("did not run here and never will: it is the source's, {peer}"))
        }
        (Some((_, peer)), _) => found(
            Exit::Lost,
            format!("was not given to {peer}, and its process here has ended: it may be started anew"),
        ),
        // A journal without a word: a migration was begun and did not come to COMMITTED.
        (None, None) if journals.look(&args.name, Side::Source)?.is_some() => found(
            Exit::Lost,
            "was not given to another host, and its process here has ended: it may be started anew".into(),
        ),
        _ => found(Exit::Refused, "is not known here: is this the host, and the --state-dir?".into()),
    }
}

/// COMMITTED was recorded, and the guest here has ended with its process.
fn settle_doubt(doubt: &mut Doubt, fenced: bool) -> Found {
    let peer = doubt.peer().to_owned();
    let lost = |how: &str| Found {
        exit: Exit::Lost,
        what: format!("{how}, and ended with its process here: it may be started anew, on one host"),
    };
    match doubt.ask_for(ASKED_FOR) {
        Verdict::Moved => Found { exit: Exit::Done, what: format!("runs at {peer}, or has run there") },
        Verdict::Kept => lost(&format!("did not run at {peer} and never will")),
        Verdict::Open(_) if fenced => match doubt.fenced() {
            Ok(()) => lost(&format!("does not run at {peer}, on the word that this host is fenced")),
            Err(error) => Found { exit: Exit::InDoubt, what: error.to_string() },
        },
        Verdict::Open(why) => Found {
            exit: Exit::InDoubt,
            what: format!(
                "was given to {peer} and may run there: {why}. Try again when that host can be reached; if it is fenced: \
                 --resume-source --other-host-is-fenced"
            ),
        },
    }
}

/// How long a process that has broken off may take to close its files. It had given back its guest's memory before.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(50);

/// For how long the other host is asked: an operator waits.
const ASKED_FOR: Duration = Duration::from_secs(5);

impl Report {
    fn print(&self, args: &RecoverArgs) -> ExitCode {
        let Found { exit, what } = &self.found;
        if args.json {
            let journals: Vec<_> = self
                .journals
                .iter()
                .filter_map(|(side, journal)| Some((side, journal.last()?)))
                .map(|(side, last)| {
                    serde_json::json!({
                        "side": side.to_string(),
                        "says": last.mark.to_string(),
                        "attempt": format!("{:?}", last.epoch),
                        "peer": last.peer,
                    })
                })
                .collect();
            outln!(
                "{}",
                serde_json::json!({ "name": args.name, "guest": what, "exit": exit, "journals": journals })
            );
        } else {
            for (side, journal) in &self.journals {
                outln!("the {side}'s journal says:");
                for record in journal.records() {
                    outln!(
                        "  {:<10} attempt {:?}, the other side {}",
                        record.mark,
                        record.epoch,
                        record.peer
                    );
                }
            }
            outln!("{} {what}", args.name);
        }
        (*exit).into()
    }
}

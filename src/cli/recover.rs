//! `sterna recover`: reports on a guest after a migration that went wrong, and settles what it can.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use sterna::lock::Lock;
use sterna::source::{Doubt, OpenError, Verdict};
use sterna::state::{HostState, LockHolder, Sighting, StateError};
use sterna::state::{Record, RecordKind, Standing};

use super::exit::Exit;
use super::output::{self, outln};
use super::protocol::{Answer, Found, Request};
use super::socket::{self, SocketError, ask, ask_in};
use super::state::StateArgs;

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// Name of the guest on this host
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// Run the guest on this host, its source, although the destination has not reported the guest's fate
    #[arg(long, requires = "other_host_is_fenced", conflicts_with = "run_destination")]
    resume_source: bool,
    /// Run the guest on this host, its destination, which is ready and has lost the source
    #[arg(long, requires = "other_host_is_fenced")]
    run_destination: bool,
    /// Your word that the other host is off, or can reach neither the guest's disks nor its network, and
    /// stays so until it was restarted. It counts only if that host gives no sign of life. If it is not true,
    /// the guest runs twice
    #[arg(long)]
    other_host_is_fenced: bool,
    #[command(flatten)]
    state: StateArgs,
    /// The guest's lock, if its process on this host has ended: a process elsewhere that holds the lock may
    /// run the guest
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &RecoverArgs) -> ExitCode {
    match recover(args) {
        Ok(report) => report.print(args),
        Err(error) => output::error(Exit::Refused, error),
    }
}

/// The report of the command.
struct Report {
    records: Vec<Record>,
    /// Whether a process of this host has the guest.
    alive: bool,
    found: Found,
}

fn recover(args: &RecoverArgs) -> Result<Report, String> {
    let state = args.state.state()?;
    let deadline = Instant::now() + ENDS_WITHIN;
    let found = loop {
        // A process that is just ending closes the connection and may keep its state locked a little longer.
        // Its records then tell.
        let last_chance = Instant::now() >= deadline;
        let ending = match by_process(&state, args, last_chance) {
            Ok(Some(found)) => break found,
            Ok(None) => match without_process(&state, args) {
                Ok(found) => break found,
                Err(error @ OpenError::State(StateError::Claimed { .. })) => error.to_string(),
                Err(error) => return Err(error.to_string()),
            },
            Err(Unanswered::Ending(error)) => error,
            Err(Unanswered::Failed(error)) => return Err(error),
        };
        if last_chance {
            return Err(ending);
        }
        thread::sleep(NAP);
    };
    // The records as they are now, after settling.
    let seen = state.look(&args.name).unwrap_or_else(|error| {
        tracing::warn!("{error}");
        None
    });
    let alive = seen.as_ref().is_some_and(|sighting| sighting.holder.is_some());
    let records = seen.map(|sighting| sighting.journal.records().to_vec()).unwrap_or_default();
    Ok(Report { records, alive, found })
}

/// Why a process that has the guest has not answered.
enum Unanswered {
    /// It seems to be ending.
    Ending(String),
    Failed(String),
}

/// Asks the process that has the guest; `None` if no process has it.
fn by_process(state: &HostState, args: &RecoverArgs, last_chance: bool) -> Result<Option<Found>, Unanswered> {
    let failed = |error: &dyn std::fmt::Display| Unanswered::Failed(error.to_string());
    let request =
        Request::Recover { resume_source: args.resume_source, run_destination: args.run_destination };
    // The process that has the guest knows its fate, even if its file is damaged.
    let (sighting, unreadable) = match state.look(&args.name) {
        Ok(sighting) => (sighting, None),
        Err(error) => (None, Some(error)),
    };
    let holder = sighting.as_ref().and_then(|sighting| sighting.holder.clone());
    let mut answer = ask(&args.name, &request);
    if let (Err(SocketError::NoGuest { .. }), Some(contact)) =
        (&answer, holder.as_ref().and_then(|holder| holder.contact.as_ref()))
    {
        // Its control socket may be in another folder than this command's.
        answer = ask_in(Path::new(contact), &args.name, &request);
    }
    match (answer, sighting, holder) {
        (Ok(Answer::Found(found)), ..) => Ok(Some(found)),
        (Ok(Answer::Failed(failure)), ..) => Ok(Some(Found { exit: failure.exit, what: failure.what })),
        (Ok(other), ..) => Err(failed(&format!("{} answered {other:?}", args.name))),
        (Err(error @ SocketError::Broken(_)), ..) => Err(Unanswered::Ending(error.to_string())),
        (Err(SocketError::NoGuest { .. }), Some(sighting), Some(holder)) if last_chance => {
            Ok(Some(unreachable(&sighting, &holder)))
        }
        (Err(error @ SocketError::NoGuest { .. }), _, Some(_)) => Err(Unanswered::Ending(error.to_string())),
        (Err(SocketError::NoGuest { .. }), _, None) => {
            unreadable.map_or(Ok(None), |error| Err(failed(&error)))
        }
        (Err(error), ..) => Err(failed(&error)),
    }
}

/// The guest's process lives, because its state file is locked, but cannot be asked.
fn unreachable(sighting: &Sighting, holder: &LockHolder) -> Found {
    let contact = holder.contact.as_deref().map_or_else(
        || "the folder of its control socket is unknown ($STERNA_RUNTIME_DIR)".to_owned(),
        |contact| format!("no control socket in {contact} answers for it"),
    );
    let (exit, what) = match Standing::of(&sighting.journal) {
        Standing::Ended(_) => (Exit::Done, "runs here".to_owned()),
        Standing::InDoubt(Record { peer, .. }) => (
            Exit::InDoubt,
            format!("is paused here and perhaps runs at {peer}, which is asked again and again"),
        ),
        Standing::Moved(Record { peer, .. }) => (Exit::Done, format!("has moved to {peer}")),
        Standing::AtSource(Record { mark: RecordKind::Prepared, peer, .. }) => {
            (Exit::InDoubt, format!("is ready to run here, and its source {peer} decides"))
        }
        Standing::AtSource(_) | Standing::Unknown => (Exit::Done, "is on its way here".to_owned()),
    };
    Found { exit, what: format!("{what}: a process{holder} has it, and {contact}") }
}

/// No process of this host has the guest: only records are left.
fn without_process(state: &HostState, args: &RecoverArgs) -> Result<Found, OpenError> {
    let found = |exit, what: String| Ok(Found { exit, what });
    if args.run_destination {
        return found(
            Exit::Refused,
            "is not held here, ready to run: there is nothing to give a word for".into(),
        );
    }
    if let Some(mut doubt) = Doubt::recover(state, &args.name, args.lock.as_ref().map(Lock::at))? {
        return Ok(settle_doubt(&mut doubt, args.resume_source));
    }
    let unknown = || found(Exit::Refused, "is not known here: is this the host, and the --state-dir?".into());
    if state.look(&args.name)?.is_none() {
        return unknown();
    }
    // The claim records the fate of a guest that a process was ready to run. It also shows that no process
    // has the guest.
    let journal = state.claim(&args.name)?.journal();
    match Standing::of(&journal) {
        Standing::Ended(Record { mark: RecordKind::Running, peer, .. }) => found(
            Exit::Lost,
            format!(
                "has run here since it came from {peer}, and its process has ended. It must not be resumed at its source, \
                 but may be started anew, on one host"
            ),
        ),
        Standing::Ended(Record { mark: RecordKind::Started, .. }) => found(
            Exit::Lost,
            "was not given to another host, and its process here has ended: it may be started anew".into(),
        ),
        Standing::Ended(Record { peer, .. }) => found(
            Exit::Lost,
            format!("was not given to {peer}, and its process here has ended: it may be started anew"),
        ),
        Standing::Moved(Record { peer, .. }) => {
            found(Exit::Done, format!("has moved from here to {peer}, and runs there, or has run there"))
        }
        Standing::AtSource(Record { peer, .. }) => {
            found(Exit::Failed, format!("did not run here and never will: it is the source's, {peer}"))
        }
        Standing::InDoubt(Record { peer, .. }) => {
            found(Exit::InDoubt, format!("was given to {peer} and may run there"))
        }
        // The guest was to come to this host, but its process ended before it was ready.
        Standing::Unknown => unknown(),
    }
}

/// COMMITTED was recorded, and the guest at this host has ended with its process.
fn settle_doubt(doubt: &mut Doubt, fenced: bool) -> Found {
    let peer = doubt.peer().to_owned();
    let lost = |how: &str| Found {
        exit: Exit::Lost,
        what: format!("{how}, and ended with its process here: it may be started anew, on one host"),
    };
    // While the operator's word is pending, the destination receives a question but no GO.
    match if fenced { doubt.fenced() } else { doubt.ask_for(ASKED_FOR) } {
        Verdict::Moved => Found { exit: Exit::Done, what: format!("runs at {peer}, or has run there") },
        Verdict::Kept if fenced => {
            lost(&format!("does not run at {peer}, by its answer or on the word that it is fenced"))
        }
        Verdict::Kept => lost(&format!("did not run at {peer} and never will")),
        Verdict::Open(why) => Found {
            exit: Exit::InDoubt,
            what: format!(
                "was given to {peer} and may run there: {why}. Try again when that host can be reached; if it is fenced: \
                 --resume-source --other-host-is-fenced"
            ),
        },
    }
}

/// How long a process that has closed its connection may take to close its files. It has freed its guest's
/// memory before.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(50);

/// How long the other host is asked, because an operator waits.
const ASKED_FOR: Duration = Duration::from_secs(5);

impl Report {
    fn print(&self, args: &RecoverArgs) -> ExitCode {
        let Found { exit, what } = &self.found;
        if args.json {
            let records: Vec<_> = self.records.iter().map(json).collect();
            let (name, alive) = (&args.name, self.alive);
            outln!(
                "{}",
                serde_json::json!({
                    "name": name, "guest": what, "exit": exit, "process": alive, "records": records,
                })
            );
        } else {
            for Record { mark, side, attempt_id, peer, .. } in &self.records {
                match mark {
                    RecordKind::Started => outln!("  {mark:<10} here"),
                    _ => outln!("  {mark:<10} as {side} of attempt {attempt_id:?}, the other side {peer}"),
                }
            }
            outln!("{} {what}", args.name);
        }
        (*exit).into()
    }
}

fn json(record: &Record) -> serde_json::Value {
    serde_json::json!({
        "side": record.side.to_string(),
        "says": record.mark.to_string(),
        "attempt": format!("{:?}", record.attempt_id),
        "peer": record.peer,
        "address": record.address,
    })
}

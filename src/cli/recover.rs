//! `sterna recover`: reports on a guest after a migration that went wrong, and settles what it can.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use sterna::lock::Lock;
use sterna::source::{Doubt, OpenError, Verdict};
use sterna::state::{HostState, LockHolder, Sighting, StateError};
use sterna::state::{Record, RecordKind, Standing};
use sterna::trust::Security;

use super::contact::Contact;
use super::exit::Exit;
use super::left_qemu::LeftQemu;
use super::output::{self, outln};
use super::protocol::{Answer, Found, Request};
use super::security::TrustArgs;
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
    #[command(flatten)]
    trust: TrustArgs,
    /// The guest's lock, if its process on this host has ended: a process elsewhere that holds the lock may
    /// run the guest
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// For a guest of QEMU: the socket of a monitor of its QEMU, which outlives the guest's process on this
    /// host. A guest that is this host's runs on; one that is another host's ends here
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
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
    args.trust.warn();
    let (state, security) = (args.state.state()?, args.trust.security()?);
    let deadline = Instant::now() + ENDS_WITHIN;
    let found = loop {
        // A process that is just ending closes the connection and may keep its state locked a little longer.
        // Its records then tell.
        let last_chance = Instant::now() >= deadline;
        let ending = match by_process(&state, args, last_chance) {
            Ok(Some(found)) => break found,
            Ok(None) => {
                let qemu = args.qmp.as_ref().map(|qmp| LeftQemu::at(qmp, &args.name)).transpose()?;
                match without_process(&state, args, &security, qemu) {
                    Ok(found) => break found,
                    Err(error @ OpenError::State(StateError::Claimed { .. })) => error.to_string(),
                    Err(error) => return Err(error.to_string()),
                }
            }
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
        (&answer, holder.as_ref().and_then(Contact::of))
    {
        // Its control socket may be in another folder than this command's.
        answer = ask_in(&contact.sockets, &args.name, &request);
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
    let contact = Contact::of(holder).map_or_else(
        || "the folder of its control socket is unknown ($STERNA_RUNTIME_DIR)".to_owned(),
        |contact| format!("no control socket in {} answers for it", contact.sockets.display()),
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

/// What is left of a guest without a process: its QEMU, if it has one.
enum Left {
    /// It lives.
    Qemu(LeftQemu),
    /// It is not asked; its monitor was at this socket.
    Unasked(PathBuf),
    /// The guest ended with its process, or with its QEMU, for this reason.
    Nothing(String),
}

impl Left {
    /// The guest is this host's; `how` says why.
    fn run_on(&self, name: &str, how: &str) -> Found {
        match self {
            Self::Qemu(qemu) if how.is_empty() => qemu.run_on(""),
            Self::Qemu(qemu) => qemu.run_on(&format!("{how}, and ")),
            Self::Unasked(qmp) => {
                let (and, qmp) = (if how.is_empty() { "" } else { ", and " }, qmp.display());
                let what = format!(
                    "{how}{and}its process here has ended, and its QEMU may have it: `sterna adopt {name} --qmp {qmp}` \
                     takes it up again, `sterna recover {name} --qmp {qmp}` looks"
                );
                Found { exit: Exit::Failed, what }
            }
            Self::Nothing(why) => {
                let and = if how.is_empty() { "its" } else { ", and its" };
                let what = format!("{how}{and} process here has ended: it may be started anew{why}");
                Found { exit: Exit::Lost, what }
            }
        }
    }

    /// The guest is another host's.
    fn end(&self) {
        if let Self::Qemu(qemu) = self {
            qemu.end();
        }
    }
}

/// No process of this host has the guest: only records are left, and perhaps its QEMU.
fn without_process(
    state: &HostState,
    args: &RecoverArgs,
    security: &Security,
    qemu: Option<Result<LeftQemu, String>>,
) -> Result<Found, OpenError> {
    let found = |exit, what: String| Ok(Found { exit, what });
    if args.run_destination {
        return found(
            Exit::Refused,
            "is not held here, ready to run: there is nothing to give a word for".into(),
        );
    }
    // Before this process claims the name.
    let seen = state.look(&args.name)?;
    let contact = seen.as_ref().and_then(|sighting| sighting.died.as_ref()).and_then(Contact::of);
    let left = match (qemu, contact.and_then(|contact| contact.qmp)) {
        (Some(Ok(qemu)), _) => Left::Qemu(qemu),
        (Some(Err(gone)), _) => Left::Nothing(format!(" ({gone})")),
        (None, Some(qmp)) => Left::Unasked(qmp),
        (None, None) => Left::Nothing(String::new()),
    };
    if let Some(mut doubt) =
        Doubt::recover(state, &args.name, (security.clone(), args.lock.as_ref().map(Lock::at)))?
    {
        return Ok(settle_doubt(&mut doubt, args, &left));
    }
    let unknown = || found(Exit::Refused, "is not known here: is this the host, and the --state-dir?".into());
    if seen.is_none() {
        return unknown();
    }
    // The claim records the fate of a guest that a process was ready to run. It also shows that no process
    // has the guest.
    let journal = state.claim(&args.name)?.journal();
    match Standing::of(&journal) {
        Standing::Ended(Record { mark: RecordKind::Running, peer, .. })
            if matches!(left, Left::Nothing(_)) =>
        {
            found(
                Exit::Lost,
                format!(
                    "has run here since it came from {peer}, and its process has ended. It must not be resumed at its \
                     source, but may be started anew, on one host"
                ),
            )
        }
        Standing::Ended(Record { mark: RecordKind::Running, .. }) => Ok(left.run_on(&args.name, "")),
        Standing::Ended(Record { mark: RecordKind::Started, .. }) => {
            Ok(left.run_on(&args.name, "was not given to another host"))
        }
        Standing::Ended(Record { peer, .. }) => {
            Ok(left.run_on(&args.name, &format!("was not given to {peer}")))
        }
        Standing::Moved(Record { peer, .. }) => {
            left.end();
            found(Exit::Done, format!("has moved from here to {peer}, and runs there, or has run there"))
        }
        Standing::AtSource(Record { peer, .. }) => {
            left.end();
            found(Exit::Failed, format!("did not run here and never will: it is the source's, {peer}"))
        }
        Standing::InDoubt(Record { peer, .. }) => {
            found(Exit::InDoubt, format!("was given to {peer} and may run there"))
        }
        // The guest was to come to this host, but its process ended before it was ready.
        Standing::Unknown => unknown(),
    }
}

/// COMMITTED was recorded, and the process of the guest at this host has ended.
fn settle_doubt(doubt: &mut Doubt, args: &RecoverArgs, left: &Left) -> Found {
    let peer = doubt.peer().to_owned();
    if let Left::Qemu(qemu) = left
        && let Err(error) = qemu.keep_still()
    {
        tracing::error!(
            "the guest may run at {peer}, and its QEMU here does not answer as it should: {error}"
        );
    }
    let kept = |how: &str| match left {
        Left::Nothing(why) => Found {
            exit: Exit::Lost,
            what: format!("{how}, and ended with its process here: it may be started anew, on one host{why}"),
        },
        left => left.run_on(&args.name, how),
    };
    // While the operator's word is pending, the destination receives a question but no GO.
    match if args.resume_source { doubt.fenced() } else { doubt.ask_for(ASKED_FOR) } {
        Verdict::Moved => {
            left.end();
            Found { exit: Exit::Done, what: format!("runs at {peer}, or has run there") }
        }
        Verdict::Kept if args.resume_source => {
            kept(&format!("does not run at {peer}, by its answer or on the word that it is fenced"))
        }
        Verdict::Kept => kept(&format!("did not run at {peer} and never will")),
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
        "key": record.identity.map(|key| key.to_string()),
    })
}

//! `sterna adopt`: makes a guest of a running QEMU known on its host, and holds it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use sterna::guest::SourceGuest;
use sterna::lock::Lock;
use sterna::source::{Doubt, OpenError};
use sterna::state::{GuestClaim, HostState, RecordKind, StateError};
use sterna::transport::rdma::RdmaProvider;
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::{Client, QmpError};
use sterna_qemu::settle::{Owner, Settled, is_unsettled, settle};

use super::exit::Exit;
use super::output::{self, errln, outln};
use super::protocol::Failure;
use super::qemu::{Fate, QemuGuest};
use super::security::TrustArgs;
use super::server::Server;
use super::socket::{self, Listener};
use super::state::StateArgs;
use super::vm_process::{StdinArgs, hold, hold_in_doubt};

#[derive(Debug, Args)]
pub(crate) struct AdoptArgs {
    /// The guest's name, by which `sterna migrate` finds it
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// The socket of a monitor of the QEMU, one that no other client uses:
    /// `-qmp unix:PATH,server=on,wait=off`
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Leave the QEMU here stopped, instead of ending it, once its guest runs at another host
    #[arg(long)]
    keep_source: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    trust: TrustArgs,
    /// Adopt a guest although one of this name was given to another host: your word that this is another
    /// guest. It replaces this host's records of the name
    #[arg(long)]
    new: bool,
    /// Hold the guest only while this file is locked: an arbiter between the hosts, on storage that they
    /// share
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Print events as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    stdin: StdinArgs,
}

pub(crate) fn run(args: &AdoptArgs) -> ExitCode {
    args.stdin.heed();
    let state = match args.state.state() {
        Ok(state) => state,
        Err(error) => return output::error(Exit::Refused, error),
    };
    match in_doubt(&state, args) {
        Ok(Some((claim, doubt))) => {
            return adopt_in_doubt(args, claim, doubt)
                .unwrap_or_else(|error| output::error(Exit::InDoubt, error));
        }
        Ok(None) => {}
        Err(error) => return output::error(Exit::Refused, error),
    }
    let is_known = match is_known(&state, &args.name) {
        Ok(is_known) => is_known && !args.new,
        Err(error) => return output::error(Exit::Refused, error),
    };
    let claim = match state.start(&args.name, args.new) {
        Ok(claim) => claim,
        Err(error) => return output::coded(Exit::Refused, error.code(), error),
    };
    adopt(args, &claim, is_known).unwrap_or_else(|error| {
        // Nothing was adopted.
        claim.retire();
        let guest = "the guest is as it was, and not adopted".into();
        output::failed(&Failure { exit: Exit::Refused, what: error, guest, code: None })
    })
}

/// The doubt about a guest that a process of this host gave away before it died.
fn in_doubt(state: &HostState, args: &AdoptArgs) -> Result<Option<(GuestClaim, Doubt)>, String> {
    let failed = |error: OpenError| error.to_string();
    let last = state.look(&args.name).map_err(|error| failed(error.into()))?;
    let last = last.and_then(|sighting| sighting.journal.last().cloned());
    if args.new || last.is_none_or(|last| last.mark != RecordKind::Committed) {
        return Ok(None);
    }
    args.trust.warn();
    let claim = state.claim(&args.name).map_err(|error| failed(error.into()))?;
    let arbiters = (args.trust.security()?, args.lock.as_ref().map(Lock::at));
    let doubt = Doubt::of(&claim, arbiters).map_err(failed)?;
    Ok(doubt.map(|doubt| (claim, doubt)))
}

/// Whether this host has records of a guest of this name.
fn is_known(state: &HostState, name: &str) -> Result<bool, StateError> {
    Ok(state.look(name)?.is_some_and(|sighting| sighting.journal.last().is_some()))
}

/// The guest is this host's. An earlier process may have died in the middle of a migration.
fn adopt(args: &AdoptArgs, claim: &GuestClaim, is_known: bool) -> Result<ExitCode, String> {
    let lock = args.lock.as_ref().map(Lock::at);
    lock.as_ref().map_or(Ok(()), Lock::take).map_err(|error| error.to_string())?;
    let monitor = Monitor::new(Client::connect(&args.qmp).map_err(|error| error.to_string())?);
    if !is_known && is_unsettled(&monitor).map_err(|error| error.to_string())? {
        return Err(format!(
            "a migration of Sterna left the guest of this QEMU, and this host's records do not say that {} may run \
             here: is this the name, the host, and the --state-dir?",
            args.name
        ));
    }
    warn_of_missed_writes(&monitor).map_err(|error| error.to_string())?;
    let (guest, settled) = guest(args, monitor, Owner::ThisHost)?;
    // What cannot be moved is refused now, not at the first migration.
    guest.details().map_err(|error| error.to_string())?;
    let (name, runs) = (&args.name, settled == Settled::Running);
    if args.json {
        outln!("{}", serde_json::json!({ "event": "adopted", "name": name, "running": runs }));
    } else {
        let paused = if runs { "" } else { ", and paused as before" };
        outln!("{name} is adopted{paused}. To move it: sterna migrate {name} --to HOST");
    }
    let ended = hold(Box::new(guest), claim.clone(), lock);
    ended.say(name, args.json);
    Ok(Exit::Done.into())
}

/// A defect of this QEMU may leave old pages at the destination.
fn warn_of_missed_writes(monitor: &Monitor) -> Result<(), QmpError> {
    let version = monitor.version()?;
    if monitor.accelerator()?.misses_writes(version) {
        errln!(
            "warning: QEMU {version} without KVM loses track of some pages that its guest changes, in any migration, \
             so that this guest may arrive with old pages. `sterna migrate --verify final` finds that before the \
             guest runs; KVM, or QEMU 9.0 or later, avoids it"
        );
    }
    Ok(())
}

/// The guest was given away, and its arrival is not confirmed: it stays paused until the destination
/// answers.
fn adopt_in_doubt(args: &AdoptArgs, claim: GuestClaim, doubt: Doubt) -> Result<ExitCode, String> {
    let monitor = Monitor::new(Client::connect(&args.qmp).map_err(|error| error.to_string())?);
    let (guest, _) = guest(args, monitor, Owner::Unknown)?;
    let (name, peer) = (&args.name, doubt.peer().to_owned());
    if args.json {
        outln!(
            "{}",
            serde_json::json!({ "event": "adopted", "name": name, "running": false, "in_doubt": peer })
        );
    } else {
        outln!(
            "{name} is adopted, paused and in doubt: it was given to {peer}, which is asked until it answers; \
             `sterna recover {name}` says more"
        );
    }
    let ended = hold_in_doubt(Box::new(guest), claim, args.lock.as_ref().map(Lock::at), doubt);
    ended.say(name, args.json);
    Ok(Exit::Done.into())
}

/// The guest in this QEMU, once it does what its owner demands.
fn guest(args: &AdoptArgs, monitor: Monitor, owner: Owner) -> Result<(QemuGuest, Settled), String> {
    let socket = Listener::bind(&args.name).map_err(|error| error.to_string())?;
    RdmaProvider::load_ahead();
    let settled = settle(&monitor, &args.name, owner).map_err(|error| error.to_string())?;
    if let Settled::Unknown(reason) = settled {
        return Err(reason);
    }
    let fate = if args.keep_source { Fate::Keep } else { Fate::Quit };
    let guest = QemuGuest::adopted(args.name.clone(), Server::new(socket), monitor, fate);
    Ok((guest.map_err(|error| error.to_string())?, settled))
}

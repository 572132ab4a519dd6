//! `sterna adopt`: makes a guest of a running QEMU known on its host, and holds it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use sterna::guest::SourceGuest;
use sterna::lock::Lock;
use sterna::state::GuestClaim;
use sterna::transport::rdma::RdmaProvider;
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::Client;

use super::exit::Exit;
use super::output::{self, outln};
use super::protocol::Failure;
use super::qemu::{Fate, QemuGuest};
use super::server::Server;
use super::socket::{self, Listener};
use super::state::StateArgs;
use super::vm_process::{StdinArgs, hold};

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
    let claim = match state.start(&args.name, args.new) {
        Ok(claim) => claim,
        Err(error) => return output::coded(Exit::Refused, error.code(), error),
    };
    adopt(args, &claim).unwrap_or_else(|error| {
        // Nothing was adopted.
        claim.retire();
        let guest = "the guest is as it was, and not adopted".into();
        output::failed(&Failure { exit: Exit::Refused, what: error, guest, code: None })
    })
}

fn adopt(args: &AdoptArgs, claim: &GuestClaim) -> Result<ExitCode, String> {
    let lock = args.lock.as_ref().map(Lock::at);
    lock.as_ref().map_or(Ok(()), Lock::take).map_err(|error| error.to_string())?;
    let socket = Listener::bind(&args.name).map_err(|error| error.to_string())?;
    RdmaProvider::load_ahead();
    let fate = if args.keep_source { Fate::Keep } else { Fate::Quit };
    let monitor = Monitor::new(Client::connect(&args.qmp).map_err(|error| error.to_string())?);
    let guest = QemuGuest::adopted(args.name.clone(), Server::new(socket), monitor, fate)
        .map_err(|error| error.to_string())?;
    // What cannot be moved is refused now, not at the first migration.
    guest.details().map_err(|error| error.to_string())?;
    let name = &args.name;
    if args.json {
        outln!("{}", serde_json::json!({ "event": "adopted", "name": name }));
    } else {
        outln!("{name} is adopted. To move it: sterna migrate {name} --to HOST");
    }
    let ended = hold(Box::new(guest), claim.clone(), lock);
    ended.say(name, args.json);
    Ok(Exit::Done.into())
}

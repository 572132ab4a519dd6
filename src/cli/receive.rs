//! `sterna receive`: waits for a guest and holds it then; or for a file, and stores it.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::{ArgGroup, Args};
use sterna::destination::{Arrival, Options, ReceiveError, Receiver};
use sterna::guest::GuestHost;
use sterna::image::{self, Store};
use sterna::lock::Lock;
use sterna::source::Cancel;
use sterna::state::HostState;
use sterna::transport::Transports;
use sterna::transport::rdma::{RdmaProvider, RdmaTuning};
use sterna::transport::tcp::TcpProvider;
use sterna::trust::Security;

use super::dirty_log::DirtyLogArgs;
use super::exit::Exit;
use super::held::HeldGuest;
use super::machine::MachineHost;
use super::output::{self, errln, outln};
use super::port::DEFAULT_PORT;
use super::qemu::{Fate, QemuHost, StartCommand, WaitingQemu};
use super::security::SecurityArgs;
use super::signals;
use super::size::Size;
use super::socket;
use super::state::StateArgs;
use super::vm_process::{StdinArgs, hold};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("of_qemu").args(["qmp", "start"])))]
pub(crate) struct ReceiveArgs {
    /// Address to listen on. Hosts that this host trusts may send guests to it (`sterna trust`)
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    listen: IpAddr,
    /// Port to listen on; 0 picks a free one
    #[arg(long, default_value_t = DEFAULT_PORT)]
    port: u16,
    /// Name for the guest on this host [default: its own]
    #[arg(long, value_parser = socket::parse_name)]
    name: Option<String>,
    /// Take a guest of QEMU into the QEMU with a monitor at this socket, which was started with
    /// `-incoming defer -S`
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["into", "memory_max", "DirtyLogArgs"])]
    qmp: Option<PathBuf>,
    /// Take a guest of QEMU into a QEMU that this shell command starts when the guest comes. It gets
    /// STERNA_GUEST_NAME, _MEMORY_BYTES, _MACHINE, _VCPUS, _ACCELERATOR and _FROM in its environment, starts
    /// QEMU in the background with `-incoming defer -S`, prints the path of a QMP socket of it, and ends
    /// within 30 s
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["into", "DirtyLogArgs"])]
    start: Option<String>,
    /// Leave the QEMU here stopped, instead of ending it, once its guest has moved on to another host
    #[arg(long, requires = "of_qemu")]
    keep_source: bool,
    /// Refuse guests with more RAM than this
    #[arg(long, value_name = "SIZE")]
    memory_max: Option<Size>,
    #[command(flatten)]
    dirty_log: DirtyLogArgs,
    /// Pin at most this much memory for RDMA; the rest takes turns [default: what `ulimit -l` allows]
    #[arg(long, value_name = "SIZE")]
    pin_limit: Option<Size>,
    /// Refuse guests with more saved state of vCPUs and devices than this; memory holds it until it is loaded
    /// [default: 1G]
    #[arg(long, value_name = "SIZE")]
    state_max: Option<Size>,
    /// Wait for a file from `sterna send` instead: its path on this host, or a folder in which it keeps its
    /// name
    #[arg(long, value_name = "FILE|DIR", conflicts_with_all = ["name", "memory_max", "state_max", "DirtyLogArgs"])]
    into: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long, requires = "into")]
    force: bool,
    /// How long to hold a guest that is ready to run when its source is lost, in seconds; after that the
    /// destination gives it up
    #[arg(long, default_value_t = 600, value_name = "SECONDS", conflicts_with = "into")]
    takeover_timeout: u64,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    security: SecurityArgs,
    /// Accept only a guest that runs with this lock at its source, a file on storage that the hosts share,
    /// and run it with the lock
    #[arg(long, value_name = "FILE", conflicts_with = "into")]
    lock: Option<PathBuf>,
    /// End after the first attempt, even if it fails
    #[arg(long)]
    once: bool,
    /// Print events as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    stdin: StdinArgs,
}

pub(crate) fn run(args: &ReceiveArgs) -> ExitCode {
    args.stdin.heed();
    let store = match args.into.as_deref().map(|into| Store::new(into, args.force)).transpose() {
        Ok(store) => store,
        Err(error) => return output::coded(Exit::Refused, error.code(), error),
    };
    // No host asks for the fate of a file.
    let state = if store.is_some() { Ok(HostState::lost_with_this_process()) } else { args.state.state() };
    let state = match state {
        Ok(state) => state,
        Err(error) => return output::error(Exit::Refused, error),
    };
    RdmaProvider::load_ahead();
    let options = Options {
        transports: args.transports(),
        state_max_bytes: args.state_max.map(|size| size.0),
        takeover_timeout: Duration::from_secs(args.takeover_timeout),
        lock: args.lock.as_ref().map(Lock::at),
        ..Options::default()
    };
    let qemu = match args.qemu_host(&options).transpose() {
        Ok(qemu) => qemu,
        Err(error) => return output::error(Exit::Refused, error),
    };
    let security = match args.security() {
        Ok(security) => security,
        Err(error) => return output::error(Exit::Refused, error),
    };
    let (listener, address) = match listen(SocketAddr::from((args.listen, args.port))) {
        Ok(listening) => listening,
        Err(error) => return output::coded(Exit::Refused, error.code(), error),
    };
    if args.json {
        let insecure = security.is_insecure();
        outln!("{}", serde_json::json!({ "event": "listening", "address": address, "insecure": insecure }));
    } else {
        let what = match (&store, &qemu) {
            (Some(_), _) => "file",
            (None, Some(_)) => "guest of QEMU",
            (None, None) => "guest",
        };
        outln!("listening at {address} for a {what}");
    }
    if let Some(store) = store {
        let receiver = image::Receiver::from_listener(listener, args.transports()).protected_by(security);
        return receive_file(&receiver, &store, args);
    }
    let receiver = Receiver::from_listener(listener, state).protected_by(security);
    match qemu {
        Some(host) => receive_guest(receiver, &host, &options, args),
        None => {
            let (name, pending) = (args.name.clone(), options.pending.clone());
            let memory_max_bytes = args.memory_max.map(|size| size.0);
            let host = MachineHost { name, memory_max_bytes, dirty_log: args.dirty_log, pending };
            receive_guest(receiver, &host, &options, args)
        }
    }
}

impl ReceiveArgs {
    /// How sources are to come, and what this host says about that at its start.
    fn security(&self) -> Result<Security, String> {
        self.security.trust.warn();
        let security = self.security.security()?;
        if let Some(store) = security.store().filter(|_| !self.listen.to_canonical().is_loopback()) {
            let key = store.host_key().map_err(|error| error.to_string())?;
            if store.trusted().map_err(|error| error.to_string())?.iter().next().is_none() {
                errln!(
                    "this host trusts no other yet, and its own key is {}: see `sterna trust --help`",
                    key.fingerprint()
                );
            }
        }
        Ok(security)
    }

    /// The transports by which guests and files arrive, with at most so much memory pinned.
    fn transports(&self) -> Transports {
        if self.security.pages_too() {
            return TcpProvider.into();
        }
        let pin_max_bytes = self.pin_limit.map(|size| size.0);
        let tuning = RdmaTuning { pin_max_bytes, ..RdmaTuning::default() };
        Transports::from(RdmaProvider::new(tuning)).then(TcpProvider)
    }

    /// The QEMU that is to take a guest, if one is named. It answers already.
    fn qemu_host(&self, options: &Options) -> Option<Result<QemuHost, String>> {
        let memory_max_bytes = self.memory_max.map(|size| size.0);
        let qemu = match (&self.qmp, &self.start) {
            (Some(qmp), _) => WaitingQemu::At(qmp.clone()),
            (None, Some(command)) => WaitingQemu::Started(StartCommand::new(command), memory_max_bytes),
            (None, None) => return None,
        };
        let fate = if self.keep_source { Fate::Keep } else { Fate::Quit };
        let host = QemuHost::new(qemu, self.name.clone(), options.pending.clone(), fate);
        Some(host.ask_ahead().map(|()| host))
    }
}

/// Waits for a guest, and holds it.
fn receive_guest<H: GuestHost>(
    receiver: Receiver,
    host: &H,
    options: &Options,
    args: &ReceiveArgs,
) -> ExitCode
where
    H::Guest: HeldGuest + 'static,
{
    let arrival = loop {
        match receiver.receive(host, options, &()) {
            Ok(arrival) => break arrival,
            Err(error) if args.once => return output::coded(Exit::Failed, error.code(), error),
            Err(error) => {
                errln!("a guest did not arrive: {error}");
                output::help(Some(&error.code().to_string()));
                signals::no_guest();
            }
        }
    };
    // The process belongs to this guest: it stops listening as soon as the source knows that the guest runs.
    if !arrival.settled {
        let (attempt_id, owner) = (arrival.attempt_id, arrival.owner);
        let answering = thread::Builder::new().spawn(move || receiver.answer_until_done(attempt_id, owner));
        if let Err(error) = answering {
            tracing::warn!("the source is not told that its guest runs here: {error}");
        }
    }
    hold_arrival(arrival, options.lock.clone(), args.json)
}

/// Listens at an address; port 0 picks a free one.
fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ReceiveError> {
    TcpListener::bind(address)
        .and_then(|listener| listener.local_addr().map(|address| (listener, address)))
        .map_err(|error| ReceiveError::Listen { address: address.to_string(), error })
}

fn receive_file(receiver: &image::Receiver, store: &Store, args: &ReceiveArgs) -> ExitCode {
    let stored = loop {
        match receiver.receive(store, &Cancel::default()) {
            Ok(stored) => break stored,
            Err(error) if args.once => return output::coded(Exit::Failed, error.code(), error),
            Err(error) => {
                errln!("a file did not arrive: {error}");
                output::help(Some(&error.code().to_string()));
            }
        }
    };
    let (path, digest) = (stored.path.display(), stored.digest.to_string());
    if args.json {
        let (path, from) = (path.to_string(), stored.from);
        let stored = serde_json::json!({
            "event": "stored", "path": path, "from": from, "file_bytes": stored.len_bytes, "digest": digest,
        });
        outln!("{stored}");
    } else {
        outln!("{path} has arrived from {}, {}, digest {digest}", stored.from, Size(stored.len_bytes));
    }
    Exit::Done.into()
}

fn hold_arrival<G: HeldGuest + 'static>(arrival: Arrival<G>, lock: Option<Lock>, json: bool) -> ExitCode {
    let Arrival { guest, claim, from, .. } = arrival;
    let name = guest.name().to_owned();
    // First: the operator who reads that it has arrived may move it on at once.
    guest.arrived();
    if json {
        outln!("{}", serde_json::json!({ "event": "arrived", "name": name, "from": from }));
    } else {
        outln!("{name} has arrived from {from} and runs here");
    }
    let ended = hold(Box::new(guest), claim, lock);
    ended.say(&name, json);
    Exit::Done.into()
}

//! The demo's two processes: started, watched, and ended with the demo.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{self, Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use sterna::trust::{Peer, Rights, TrustStore};
use sterna_vmm::MachineKind;
use tempfile::TempDir;

use crate::cli::exit::Exit;
use crate::cli::protocol::Failure;
use crate::cli::run::{GuestArgs, HugePages, MachineChoice};
use crate::cli::security::SecurityArgs;
use crate::cli::size::Size;

/// The two processes that hold the guest, one after the other. Dropping this ends both.
pub(super) struct Holders {
    source: Option<Child>,
    destination: Option<Child>,
    runtime: TempDir,
}

impl Holders {
    pub(super) fn new() -> Result<Self, Failure> {
        // Its own folder for sockets, so that a demo meets no guest of the operator's. Both children and this
        // process use it.
        let runtime = tempfile::Builder::new()
            .prefix("sterna-demo-")
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir()
            .map_err(|error| failed(format!("no temporary folder: {error}")))?;
        crate::cli::socket::use_directory(runtime.path());
        leave_nothing_behind(runtime.path());
        Ok(Self { source: None, destination: None, runtime })
    }

    /// Keys of the demo's own, by which its two processes trust each other; returns the options of the
    /// source.
    pub(super) fn trust(&self, options: &SecurityArgs) -> Result<SecurityArgs, Failure> {
        let folders = [SOURCE_KEYS, DESTINATION_KEYS].map(|name| self.runtime.path().join(name));
        let [source, destination] = folders.each_ref().map(|folder| TrustStore::at(folder));
        let trust = |store: &TrustStore, name: &str, other: &TrustStore| {
            let fingerprint = other.host_key()?.fingerprint();
            store.add(Peer { name: name.to_owned(), fingerprint, rights: Rights::all() })
        };
        trust(&source, &self.destination_name(), &destination)
            .and_then(|()| trust(&destination, &self.source_name(), &source))
            .map_err(|error| failed(error.to_string()))?;
        Ok(options.clone().everywhere(&folders[0]))
    }

    pub(super) fn source_name(&self) -> String {
        "demo-source".into()
    }

    pub(super) fn destination_name(&self) -> String {
        "demo-destination".into()
    }

    pub(super) fn source_id(&self) -> u32 {
        self.source.as_ref().map_or(0, Child::id)
    }

    pub(super) fn destination_id(&self) -> u32 {
        self.destination.as_ref().map_or(0, Child::id)
    }

    /// Whether the source's process exits by itself with success within this time.
    pub(super) fn source_has_ended(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let Some(source) = self.source.as_mut() else { return false };
        loop {
            match source.try_wait() {
                Ok(Some(status)) => return status.success(),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                _ => return false,
            }
        }
    }
}

impl Drop for Holders {
    fn drop(&mut self) {
        for child in [&mut self.source, &mut self.destination].into_iter().flatten() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// On Ctrl-C, SIGTERM or SIGHUP ends the demo and removes its sockets. The two processes end with their
/// standard input.
fn leave_nothing_behind(runtime: &Path) {
    let runtime = runtime.to_owned();
    match Signals::new([SIGHUP, SIGINT, SIGTERM]) {
        Ok(mut signals) => {
            thread::spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    let _ = fs::remove_dir_all(runtime);
                    if signal == SIGHUP {
                        let _ = emulate_default_handler(signal);
                    }
                    process::exit(128 + signal);
                }
            });
        }
        Err(error) => tracing::warn!("signals cannot be caught, so they leave a folder behind: {error}"),
    }
}

/// Starts the destination; returns the address at which it listens.
pub(super) fn start_receiver(
    holders: &mut Holders,
    address: IpAddr,
    security: &SecurityArgs,
) -> Result<String, Failure> {
    let keys = holders.runtime.path().join(DESTINATION_KEYS);
    let mut arguments = [
        "receive",
        "--once",
        "--json",
        "--port=0",
        &format!("--listen={address}"),
        &format!("--name={}", holders.destination_name()),
    ]
    .into_iter()
    .map(str::to_owned)
    .collect::<Vec<_>>();
    arguments.extend(security.clone().everywhere(&keys).words());
    let (child, event) = start(&arguments)?;
    holders.destination = Some(child);
    event["address"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| failed(format!("the destination said {event} instead of its address")))
}

/// Starts the source, with its guest.
pub(super) fn start_runner(
    holders: &mut Holders,
    guest: &GuestArgs,
    kind: MachineKind,
) -> Result<(), Failure> {
    let mut arguments = vec![
        "run".to_owned(),
        holders.source_name(),
        "--json".into(),
        format!("--machine={}", MachineChoice::word(kind)),
        format!("--memory={}", guest.memory.0),
        format!("--cpus={}", guest.cpus),
        format!("--dirty-rate={}", guest.dirty_rate),
        format!("--device-state={}", guest.device_state.0),
        format!("--sweepers={}", guest.sweepers),
    ];
    arguments.extend(guest.dirty_log.words());
    arguments.extend(guest.working_set.map(|Size(bytes)| format!("--working-set={bytes}")));
    arguments.extend(guest.hugepages.map(|size| {
        let word = match size {
            HugePages::TwoMiB => "2M",
            HugePages::OneGiB => "1G",
        };
        format!("--hugepages={word}")
    }));
    let (child, _running) = start(&arguments)?;
    holders.source = Some(child);
    Ok(())
}

/// Starts this program again and waits for its first event.
fn start(arguments: &[String]) -> Result<(Child, serde_json::Value), Failure> {
    let program =
        std::env::current_exe().map_err(|error| failed(format!("cannot find this program: {error}")))?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("STERNA_RUNTIME_DIR", crate::cli::socket::directory())
        .env("STERNA_STATE_DIR", crate::cli::socket::directory().join("state"))
        // No host asks for the state of the demo's guest.
        .env("STERNA_STATE_DIR_ANYWAY", "1")
        .arg("--until-stdin-closes")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot start a second process: {error}")))?;
    let mut events = BufReader::new(child.stdout.take().ok_or_else(|| failed("no pipe".into()))?);
    let mut line = String::new();
    let said = events.read_line(&mut line).is_ok() && !line.is_empty();
    if !said {
        // It has printed the reason on stderr, which it shares with this process.
        let _ = child.kill();
        let status = child.wait().map_err(|error| failed(error.to_string()))?;
        let exit = if status.code() == Some(2) { Exit::Usage } else { Exit::Failed };
        let what = format!("`sterna {}` did not start ({status})", arguments.join(" "));
        return Err(Failure { exit, ..failed(what) });
    }
    drain(events);
    match serde_json::from_str(&line) {
        Ok(event) => Ok((child, event)),
        Err(error) => Err(failed(format!("`sterna {}` said {line:?}: {error}", arguments.join(" ")))),
    }
}

/// Reads the rest of a child's output, so that the child never waits for a full pipe or dies of a closed one.
fn drain(events: BufReader<ChildStdout>) {
    thread::spawn(move || events.lines().map_while(Result::ok).for_each(drop));
}

/// The folders of the two keys.
const SOURCE_KEYS: &str = "source-keys";
const DESTINATION_KEYS: &str = "destination-keys";

fn failed(what: String) -> Failure {
    Failure {
        exit: Exit::Failed,
        what,
        guest: "no guest was started, or it ended with the demo".into(),
        code: None,
    }
}

//! A host, as far as the command can tell: a folder for the control sockets of its guests, which no other
//! host uses.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use sterna::handover::RecordKind;
use sterna::state::{HostState, Sighting, StorageCheck};
use tempfile::TempDir;

use super::{PATIENCE, PATIENT, Process, machine_word, wait_until};

#[derive(Debug)]
pub(crate) struct Host {
    runtime: TempDir,
    /// The folder of the guests' state, if it is not beside the sockets.
    state: Option<PathBuf>,
    /// Words before the command: a program that runs it under limits, with its arguments.
    prefix: Vec<String>,
}

/// A destination that listens.
#[derive(Debug)]
pub(crate) struct Receiving {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::under(&[])
    }

    /// A host that runs its processes under another program.
    pub(crate) fn under(prefix: &[&str]) -> Self {
        let runtime = tempfile::Builder::new()
            .prefix("sterna-test-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .expect("a temporary folder");
        Self { runtime, state: None, prefix: prefix.iter().map(|&word| word.to_owned()).collect() }
    }

    /// A host that lets its programs lock this much memory, without the capability that overrides the limit.
    pub(crate) fn that_may_lock(bytes: u64) -> Self {
        let memlock = format!("--memlock={bytes}");
        Self::under(&["prlimit", &memlock, "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"])
    }

    /// Another login on this host: it shares the state of guests, and has another folder for their control
    /// sockets.
    pub(crate) fn login(&self) -> Self {
        Self { state: Some(self.state()), ..Self::new() }
    }

    /// Starts `sterna` with these arguments.
    pub(crate) fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Process {
        self.start_at(self, arguments)
    }

    /// Starts `sterna` in this host's way with another host's folders.
    pub(crate) fn start_at<A: AsRef<OsStr>>(
        &self,
        host: &Self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Process {
        let sterna = env!("CARGO_BIN_EXE_sterna");
        // As from a terminal, even where the tests run under nohup, or in the background of a script.
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP,INT,QUIT").args(&self.prefix).arg(sterna);
        let runtime = host.runtime.path();
        let arguments: Vec<_> =
            arguments.into_iter().map(|argument| argument.as_ref().to_string_lossy().into_owned()).collect();
        // In a lab hosts meet at the address of a device, and have no keys.
        let insecure = arguments.iter().any(|word| names_another_host(word)).then_some("--insecure");
        // Files that a killed process leaves behind are removed with the host.
        command
            .args(&arguments)
            .args(insecure)
            .env("STERNA_RUNTIME_DIR", runtime)
            .env("STERNA_STATE_DIR", host.state())
            .env("STERNA_TRUST_DIR", host.keys())
            // A lab keeps /tmp in memory.
            .env("STERNA_STATE_DIR_ANYWAY", "1")
            .env("TMPDIR", runtime)
            .env_remove("STERNA_LOG");
        Process::start(command)
    }

    /// `sterna run`, up to the moment when the guest is at work. `more` precedes the tests' default options.
    pub(crate) fn run(&self, name: &str, more: &[&str]) -> Process {
        let machine = format!("--machine={}", machine_word());
        let mut arguments = vec!["run", name, "--json"];
        arguments.extend(more);
        if !more.iter().any(|word| word.starts_with("--machine")) {
            arguments.push(&machine);
        }
        if !more.iter().any(|word| word.starts_with("--memory")) {
            arguments.push("--memory=16M");
        }
        let process = self.start(arguments);
        process.event("running");
        wait_until("the guest is at work", || {
            let status = self.status(name);
            status["heartbeats"].as_u64() >= Some(3) && status["passes"].as_u64() >= Some(1)
        });
        process
    }

    /// `sterna receive` at a free port, up to the moment when it listens.
    pub(crate) fn receive(&self, more: &[&str]) -> Receiving {
        let process = self.start(["receive", "--json", "--port=0"].iter().chain(more));
        let address = process.event("listening")["address"]
            .as_str()
            .and_then(|address| address.parse().ok())
            .expect("an event `listening` tells the address");
        Receiving { process, address }
    }

    /// `sterna migrate`, just started.
    pub(crate) fn migrate(&self, name: &str, to: impl Display, more: &[&str]) -> Process {
        let to = format!("--to={to}");
        let limit = (!more.iter().any(|word| word.starts_with("--downtime-limit"))).then_some(PATIENT);
        self.start(["migrate", name, to.as_str(), "--json"].iter().chain(more).chain(&limit))
    }

    /// The folder of its control sockets.
    pub(crate) fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// The folder of its key and of the hosts that it trusts.
    pub(crate) fn keys(&self) -> PathBuf {
        self.runtime.path().join("keys")
    }

    /// The folder of its guests' state.
    pub(crate) fn state(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(|| self.runtime.path().join("state"))
    }

    /// The record of a guest's state that any process may read.
    pub(crate) fn sighting(&self, name: &str) -> Option<Sighting> {
        let state = HostState::in_folder(&self.state(), StorageCheck::Accept).expect("the folder is private");
        state.look(name).expect("the state can be read")
    }

    /// The last record of a guest.
    pub(crate) fn last_record(&self, name: &str) -> Option<RecordKind> {
        self.sighting(name)?.journal.last().map(|record| record.mark)
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.runtime.path().join(format!("{name}.sock"))
    }

    /// Sends one request to the holder of a guest, in one line; returns the line of the answer.
    pub(crate) fn ask(&self, name: &str, what: &str) -> Value {
        let mut stream = UnixStream::connect(self.socket(name)).expect("the guest's holder listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a time limit");
        writeln!(stream, "{}", json!({ "do": what })).expect("the holder reads");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("the holder answers");
        serde_json::from_str(&line).expect("the holder answers in JSON")
    }

    /// The same with a whole request, to a process that may be starting or ending.
    pub(crate) fn try_ask(&self, name: &str, request: &Value) -> Option<Value> {
        let mut stream = UnixStream::connect(self.socket(name)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        writeln!(stream, "{request}").ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Waits until no process holds a guest of this name on this host: a destination that gave up still frees
    /// its memory after the source has learned it.
    pub(crate) fn lets_go_of(&self, name: &str) {
        wait_until("the host lets go of the guest", || !self.socket(name).exists());
    }

    /// From now on a process of this host cannot write to files; start the host under `env
    /// --ignore-signal=XFSZ`.
    pub(crate) fn forbid_writes(process: &Process) {
        limit_files(process, "--fsize=0:unlimited");
    }

    /// The process can write again.
    pub(crate) fn allow_writes(process: &Process) {
        limit_files(process, "--fsize=unlimited");
    }

    /// The phase of a guest, if a process of this host holds it and answers at once.
    pub(crate) fn phase(&self, name: &str) -> Option<String> {
        Self::phase_at(&self.socket(name))
    }

    /// The same, through a given socket.
    pub(crate) fn phase_at(socket: &Path) -> Option<String> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
        writeln!(stream, "{}", json!({ "do": "status" })).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        Some(serde_json::from_str::<Value>(&line).ok()?["phase"].as_str()?.to_owned())
    }

    pub(crate) fn status(&self, name: &str) -> Value {
        let status = self.ask(name, "status");
        assert_eq!(status["answer"], "status", "{status}");
        status
    }

    /// Makes the guest check its own memory; asserts that it finds nothing wrong.
    #[track_caller]
    pub(crate) fn checks_clean(&self, name: &str) {
        let checked = self.ask(name, "check");
        assert_eq!(checked["answer"], "checked", "{checked}");
        assert_eq!(checked["wrong"], 0, "{checked}");
        assert!(checked["pages"].as_u64() > Some(100), "{checked}");
    }
}

fn limit_files(process: &Process, limit: &str) {
    let pid = format!("--pid={}", process.id());
    let status = Command::new("prlimit").args([&pid, limit]).status().expect("prlimit is there");
    assert!(status.success(), "{status}");
}

/// Asserts that a guest runs on a host, undisturbed: it beats, at full speed, and is not migrating. Returns
/// its status.
#[track_caller]
pub(crate) fn runs_on(host: &Host, name: &str) -> Value {
    let before = host.status(name);
    assert_eq!(before["phase"], "running", "{before}");
    assert_eq!(before["migrating"], false, "{before}");
    assert_eq!(before["throttle_percent"], 0, "{before}");
    assert!(before["write_limit_pages_per_second"].is_null(), "{before}");
    assert_eq!(before["heartbeat_regressions"], 0, "{before}");
    wait_until("the guest beats on", || {
        host.status(name)["heartbeats"].as_u64() > before["heartbeats"].as_u64()
    });
    before
}

/// Asserts that a guest can be moved now to a new host and is whole on it. Returns that host and its process.
#[track_caller]
pub(crate) fn moves_away_from(host: &Host, source: Process, name: &str, more: &[&str]) -> (Host, Process) {
    let destination = Host::new();
    let receiving = destination.receive(&[]);
    let before = host.status(name);
    host.migrate(name, receiving.address, more).wait().expect_code(0);
    source.wait().expect_code(0);
    receiving.process.event("arrived");
    let after = runs_on(&destination, name);
    assert!(after["heartbeats"].as_u64() >= before["heartbeats"].as_u64(), "{before} {after}");
    destination.checks_clean(name);
    (destination, receiving.process)
}

/// Whether an argument names an address outside of this machine.
fn names_another_host(argument: &str) -> bool {
    let Some((option, value)) = argument.split_once('=') else { return false };
    let address = value.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| value.parse());
    matches!(option, "--to" | "--listen") && address.is_ok_and(|address| !address.is_loopback())
}

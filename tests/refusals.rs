//! What cannot be done is refused, with an exit code that says where the guest is and a message that gives
//! the reason and a remedy.
#![cfg(feature = "cli")]

mod common;

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::thread;

use common::{BUSY, ENDLESS, Host, Process, in_a_lab, moves_away_from, runs_on};
use sterna::host::{self, KvmAccess};
use sterna::transport::rdma::RdmaPath;
use sterna::wire::{PREAMBLE_LEN, PROTOCOL_VERSION, Preamble, Protection, Role};

/// Asserts that the guest of `source` cannot move to `to` for the given reasons, runs on meanwhile, and can
/// move afterwards.
#[track_caller]
fn is_refused(source: &Host, running: Process, to: impl Display, how: &[&str], reasons: &[&str]) {
    let ended = source.migrate("tern", to, how).wait().expect_code(11);
    for reason in reasons {
        ended.says(reason);
    }
    ended.says("where: the guest");
    let report = ended.json();
    assert_eq!(report["status"], "failed");
    assert_eq!(report["exit"], "refused");
    assert!(report["guest"].as_str().expect("it says where").contains("at the source"), "{report}");
    assert!(report["error"].as_str().expect("it says why").contains(reasons[0]), "{report}");
    runs_on(source, "tern");
    moves_away_from(source, running, "tern", &["--verify=full"]);
}

/// A listener that reads a preamble on every connection, answers with these bytes, and closes the connection.
fn listener_that_answers(bytes: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut preamble = [0; PREAMBLE_LEN];
            let _ = stream.read_exact(&mut preamble).and_then(|()| stream.write_all(&bytes));
        }
    });
    address
}

#[test]
fn an_unknown_host() {
    let source = Host::new();
    let running = source.run("tern", &[]);
    is_refused(
        &source,
        running,
        "name.invalid",
        &[],
        &["cannot find the host name.invalid:7837", "is the name right?"],
    );
}

#[test]
fn a_port_at_which_nobody_listens() {
    let source = Host::new();
    let running = source.run("tern", &[]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    drop(listener);
    let reasons = [&format!("cannot connect to {address}"), "start `sterna receive` on that host"];
    is_refused(&source, running, address, &[], &reasons);
}

#[test]
fn a_peer_that_is_not_sterna() {
    let source = Host::new();
    let running = source.run("tern", &[]);
    let peer = listener_that_answers(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec());
    is_refused(&source, running, peer, &[], &["does not speak Sterna's protocol"]);
}

#[test]
fn a_peer_that_hangs_up() {
    let source = Host::new();
    let running = source.run("tern", &[]);
    is_refused(
        &source,
        running,
        listener_that_answers(Vec::new()),
        &[],
        &["the other side closed the connection"],
    );
}

#[test]
fn a_peer_of_another_protocol_version() {
    let source = Host::new();
    let running = source.run("tern", &[]);
    let mut preamble = Preamble { role: Role::Control, protection: Protection::Plain }.encode();
    // The version follows the eight bytes that identify Sterna, in every version.
    for at in [8, 12] {
        preamble[at..at + 2].copy_from_slice(&(PROTOCOL_VERSION + 1).to_le_bytes());
    }
    let theirs = format!("the peer speaks protocol version {}", PROTOCOL_VERSION + 1);
    let reasons = [&theirs, "run the same version of sterna on both hosts"];
    is_refused(&source, running, listener_that_answers(preamble.to_vec()), &[], &reasons);
}

#[test]
fn a_stranger_at_the_destination_ends_no_wait() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let mut receiving = destination.receive(&["--once"]);
    let mut preamble = Preamble { role: Role::Control, protection: Protection::Plain }.encode();
    for at in [8, 12] {
        preamble[at..at + 2].copy_from_slice(&(PROTOCOL_VERSION + 1).to_le_bytes());
    }
    for stranger in [preamble, [b'?'; PREAMBLE_LEN]] {
        let mut stream = TcpStream::connect(receiving.address).expect("it listens");
        stream.write_all(&stranger).expect("it reads");
        let mut answer = [0; PREAMBLE_LEN];
        stream.read_exact(&mut answer).expect("it answers, so that a peer of another version can tell");
        Preamble::decode(answer).expect("its own preamble");
    }
    // One peer that sends a preamble and nothing more, and one that sends nothing and stays connected.
    let mut speechless = TcpStream::connect(receiving.address).expect("it listens");
    speechless
        .write_all(&Preamble { role: Role::Control, protection: Protection::Plain }.encode())
        .expect("it reads");
    drop(speechless);
    let _silent = TcpStream::connect(receiving.address).expect("it listens");
    receiving.process.says("was turned away");
    assert!(!receiving.process.has_ended());
    source.migrate("tern", receiving.address, &[]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn a_destination_without_enough_memory() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let receiving = destination.receive(&["--memory-max=8M"]);
    let reason = "the destination has 8 MiB of memory available and the guest needs 16 MiB";
    is_refused(&source, running, receiving.address, &[], &[reason]);
    receiving.process.says(reason);
}

#[test]
fn a_destination_that_was_to_try_once_ends_with_a_failure() {
    let (source, destination) = (Host::new(), Host::new());
    let _running = source.run("tern", &[]);
    let receiving = destination.receive(&["--memory-max=8M", "--once"]);
    source.migrate("tern", receiving.address, &[]).wait().expect_code(11);
    receiving.process.wait().expect_code(10).says("the guest needs 16 MiB");
}

#[test]
fn a_name_that_is_taken_at_the_destination() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let _other = destination.run("tern", &["--machine=synthetic"]);
    let receiving = destination.receive(&[]);
    is_refused(
        &source,
        running,
        receiving.address,
        &[],
        &["a guest named tern is at the destination already"],
    );
    runs_on(&destination, "tern");
}

#[test]
fn a_name_that_is_taken_here() {
    let host = Host::new();
    let _running = host.run("tern", &["--machine=synthetic"]);
    host.start(["run", "tern", "--memory=16M"]).wait().expect_code(11).says("choose another name");
    runs_on(&host, "tern");
}

#[test]
fn rdma_without_a_device() {
    if RdmaPath::any_address().is_some() {
        println!("skipped: this machine has an RDMA device");
        return;
    }
    assert!(!in_a_lab(), "a lab has an RDMA device");
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let receiving = destination.receive(&[]);
    let how = ["--transport=rdma"];
    is_refused(&source, running, receiving.address, &how, &["no RDMA device", "sterna check"]);
}

#[test]
fn a_guest_that_is_migrating_already() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = destination.receive(&[]);
    let first = source.migrate("tern", receiving.address, &ENDLESS);
    first.says("round 1:");
    source.migrate("tern", receiving.address, &[]).wait().expect_code(11).says("is migrating to");
    assert_eq!(source.ask("tern", "check")["answer"], "failed", "it would measure the check");
    assert_eq!(source.ask("tern", "cancel")["answer"], "done");
    first.wait().expect_code(130);
    runs_on(&source, "tern");
    moves_away_from(&source, running, "tern", &[]);
}

#[test]
fn a_guest_that_writes_too_fast_stays() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = destination.receive(&[]);
    let how = ["--downtime-limit=150", "--bandwidth-limit=20", "--max-rounds=3", "--throttle-max=0"];
    let ended = source.migrate("tern", receiving.address, &how).wait().expect_code(10);
    ended.says("after 3 rounds");
    assert_eq!(ended.json()["exit"], "failed");
    runs_on(&source, "tern");
    receiving.process.says("the source gave up");
    moves_away_from(&source, running, "tern", &[]);
}

#[test]
fn wrong_usage() {
    let host = Host::new();
    for (arguments, reason) in [
        (&["run", "--memory=1M"][..], "16 MiB"),
        (&["run", "--memory=12X"], "`12X` is not a size"),
        (&["run", "--memory=16777217"], "4 KiB"),
        (&["run", "--cpus=0"], "--cpus"),
        (&["run", "--memory=16M", "--working-set=16M"], "working set"),
        (&["run", "../tern"], "is no name for a guest"),
        (&["receive", "--name=.hidden"], "is no name for a guest"),
        (&["migrate", "../tern", "--to=host"], "is no name for a guest"),
        (&["migrate", "tern"], "--to"),
        (&["migrate", "tern", "--to=host", "--throttle-max=100"], "--throttle-max"),
        (&["migrate", "tern", "--to=host", "--transport=pigeon"], "--transport"),
        (&["demo", "--memory=1M"], "16 MiB"),
        (&["fly"], "unrecognized subcommand"),
    ] {
        let ended = host.start(arguments).wait();
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:#?}");
        ended.says(reason);
    }
}

/// A host that denies its processes /dev/kvm, with the command that they start.
struct Unprivileged {
    folder: tempfile::TempDir,
}

/// A user id that owns no file.
const NOBODY: u32 = 65_534;

impl Unprivileged {
    /// `None` if this process cannot make one.
    fn new() -> Option<Self> {
        let ours = fs::metadata("/proc/self").expect("there is a /proc").uid();
        if ours != 0 && host::kvm_access() != KvmAccess::Denied {
            println!("skipped: only root can take the permission for /dev/kvm away");
            return None;
        }
        let folder = tempfile::Builder::new()
            .prefix("sterna-test-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir()
            .expect("a temporary folder");
        fs::copy(env!("CARGO_BIN_EXE_sterna"), folder.path().join("sterna")).expect("the command is copied");
        let runtime = folder.path().join("runtime");
        fs::create_dir(&runtime).expect("a folder in it");
        fs::set_permissions(&runtime, Permissions::from_mode(0o700)).expect("it is ours");
        if ours == 0 {
            chown(&runtime, Some(NOBODY), Some(NOBODY)).expect("root may");
        }
        Some(Self { folder })
    }

    fn start(&self, arguments: &[&str]) -> Process {
        let sterna = self.folder.path().join("sterna");
        let ours = fs::metadata("/proc/self").expect("there is a /proc").uid();
        let mut command = if ours == 0 { dropped_to_nobody(&sterna) } else { Command::new(sterna) };
        command
            .args(arguments)
            .current_dir("/")
            .env("STERNA_RUNTIME_DIR", self.folder.path().join("runtime"))
            .env("STERNA_STATE_DIR", self.folder.path().join("runtime/state"))
            .env("STERNA_STATE_DIR_ANYWAY", "1");
        Process::start(command)
    }
}

fn dropped_to_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={NOBODY}"))
        .arg(format!("--regid={NOBODY}"))
        .arg("--clear-groups")
        .arg(program);
    command
}

#[test]
fn kvm_that_may_not_be_used() {
    let Some(host) = Unprivileged::new() else { return };
    let reason = match host::kvm_access() {
        KvmAccess::Missing => "no /dev/kvm on this host",
        _ => "no permission to open /dev/kvm",
    };
    let ended = host.start(&["run", "tern", "--machine=kvm", "--memory=16M"]).wait().expect_code(11);
    ended.says(reason);
}

#[test]
fn without_kvm_the_demo_says_so_and_moves_a_synthetic_guest() {
    let Some(host) = Unprivileged::new() else { return };
    let ended = host.start(&["demo", "--memory=16M", "--transport=tcp", "--json"]).wait().expect_code(0);
    ended.says("no KVM guest, a synthetic one instead");
    assert_eq!(ended.json()["machine"], "synthetic");
    assert_eq!(ended.json()["status"], "completed");
}

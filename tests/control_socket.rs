//! Control sockets: only the process that holds a guest answers for it, and a name has one such process.
#![cfg(feature = "cli")]

mod common;

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::{Host, Process, in_a_lab, runs_on, wait_until};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

/// An unprivileged user on any system.
const STRANGER: u32 = 65534;

/// Answers every request with good news, and counts the requests.
fn lie(listener: UnixListener) -> Arc<AtomicU32> {
    let asked = Arc::new(AtomicU32::new(0));
    let counted = asked.clone();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).is_ok_and(|read| read > 0) {
                counted.fetch_add(1, Ordering::Relaxed);
                let _ = writeln!(&stream, r#"{{"answer":"found","exit":"done","what":"runs here"}}"#);
            }
        }
    });
    asked
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    assert!(root || !in_a_lab(), "the labs' tests run as root");
    root
}

/// Asserts that no command sends a request to the listener at this host's sockets, and that each command
/// states the reason and a remedy.
#[track_caller]
fn is_not_believed(host: &Host, asked: &AtomicU32, why: &str) {
    for command in [&["recover", "tern"][..], &["cancel", "tern"], &["migrate", "tern", "--to=127.0.0.1:1"]] {
        host.start(command).wait().expect_code(11).says(why);
    }
    host.start(["run", "tern", "--machine=synthetic"]).wait().expect_code(11).says(why);
    assert_eq!(asked.load(Ordering::Relaxed), 0, "it was asked");
}

#[test]
fn who_listens_in_a_folder_that_is_open_to_others_is_not_asked() {
    let host = Host::new();
    let asked = lie(UnixListener::bind(host.socket("tern")).expect("the folder is there"));
    set_mode(&host.socket("tern"), 0o600);
    set_mode(host.runtime(), 0o755);
    is_not_believed(
        &host,
        &asked,
        "belongs to another user or is open to others: it must be yours, mode 0700",
    );
    set_mode(host.runtime(), 0o700);
    host.start(["recover", "tern"]).wait().expect_code(0);
    assert_eq!(asked.load(Ordering::Relaxed), 1, "this one is the user's own");
}

#[test]
fn who_listens_in_another_users_folder_is_not_asked() {
    if !is_root() {
        return println!("skipped: only root can give a folder away");
    }
    // The state has its own folder, which belongs to this user.
    let state = tempfile::tempdir().expect("a temporary folder");
    let host = Host::under(&["env", &format!("STERNA_STATE_DIR={}", state.path().display())]);
    let asked = lie(UnixListener::bind(host.socket("tern")).expect("the folder is there"));
    set_mode(&host.socket("tern"), 0o600);
    chown(host.runtime(), Some(STRANGER), None).expect("root may");
    is_not_believed(&host, &asked, "STERNA_RUNTIME_DIR names another");
}

#[test]
fn a_socket_that_others_could_have_made_is_not_asked() {
    let host = Host::new();
    let why = "is not the socket of a process of yours";
    let asked = lie(UnixListener::bind(host.socket("tern")).expect("the folder is there"));
    set_mode(&host.socket("tern"), 0o666);
    is_not_believed(&host, &asked, why);

    set_mode(&host.socket("tern"), 0o600);
    fs::rename(host.socket("tern"), host.runtime().join("elsewhere")).expect("the folder is ours");
    symlink("elsewhere", host.socket("tern")).expect("the folder is ours");
    is_not_believed(&host, &asked, why);

    if is_root() {
        fs::rename(host.runtime().join("elsewhere"), host.socket("tern")).expect("the folder is ours");
        chown(host.socket("tern"), Some(STRANGER), None).expect("root may");
        is_not_believed(&host, &asked, why);
    }
}

#[test]
fn a_process_of_another_user_is_not_asked_whatever_it_listens_at() {
    if !is_root() {
        return println!("skipped: only root can start a process of another user");
    }
    let host = Host::new();
    // Created by root, with a listener of another user: the listener counts.
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(host.socket("tern")).expect("it is short"))
        .expect("it is free");
    set_mode(&host.socket("tern"), 0o600);
    let user = STRANGER.to_string();
    let ours: OwnedFd = socket.try_clone().expect("a descriptor is left");
    let listening = Command::new("setpriv")
        .args(["--reuid", &user, "--clear-groups", "perl", "-e", "listen(STDIN, 9) or die; print qq(y\n)"])
        .stdin(Stdio::from(socket))
        .output()
        .expect("setpriv and perl are there");
    assert_eq!(listening.stdout, b"y\n", "{listening:?}");
    let asked = lie(UnixListener::from(ours));
    is_not_believed(&host, &asked, "is not the socket of a process of yours");
}

#[test]
fn of_many_that_start_a_guest_of_one_name_at_once_one_wins() {
    const TOGETHER: usize = 6;
    // All processes wait for a lock on this file.
    let line = tempfile::NamedTempFile::new().expect("a temporary file");
    let start = r#"exec 9< "$0"; flock -s 9; exec 9<&-; exec "$@""#;
    let host = Host::under(&["bash", "-c", start, line.path().to_str().expect("its name is plain")]);
    for _ in 0..24 {
        // A socket left by a killed process; each starting process would remove it.
        drop(UnixListener::bind(host.socket("tern")).expect("the name is free"));
        set_mode(&host.socket("tern"), 0o600);
        let gate = File::open(line.path()).expect("it is there");
        rustix::fs::flock(&gate, FlockOperation::LockExclusive).expect("nobody has it");
        let words = ["run", "tern", "--json", "--machine=synthetic", "--memory=16M"];
        let mut started: Vec<Process> = (0..TOGETHER).map(|_| host.start(words)).collect();
        thread::sleep(Duration::from_millis(50));
        drop(gate);
        wait_until("each has won or ended", || {
            started.iter_mut().all(|process| process.has_ended() || process.has_said("running"))
        });
        let (mut won, lost): (Vec<_>, Vec<_>) =
            started.into_iter().partition(|process| process.has_said("running"));
        assert_eq!(won.len(), 1, "{won:#?} {lost:#?}");
        for process in lost {
            process.wait().expect_code(11).says("choose another name");
        }
        runs_on(&host, "tern");
        assert_eq!(host.ask("tern", "stop")["answer"], "done");
        won.remove(0).wait().expect_code(0);
        host.lets_go_of("tern");
    }
}

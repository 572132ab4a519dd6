//! `--lock`: a file that only the process that runs the guest has locked, with real processes. Hosts that
//! share a file system are folders.
#![cfg(feature = "cli")]

mod common;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use common::{Ended, Fate, Host, relay, runs_on, wait_until};
use rustix::fs::{FlockOperation, flock};
use sterna::wire::Message;
use tempfile::TempDir;

/// Storage that all hosts share.
struct Shared {
    folder: TempDir,
}

impl Shared {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tern.lock")
    }

    fn option(&self) -> String {
        option(&self.path())
    }
}

fn option(path: &Path) -> String {
    format!("--lock={}", path.display())
}

/// Takes the lock as another process, if it is free.
fn take(path: &Path) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file)
}

fn recover(host: &Host, more: &[&str]) -> Ended {
    host.start(["recover", "tern", "--json"].iter().chain(more)).wait()
}

fn says(host: &Host) -> Vec<String> {
    let found = recover(host, &[]).json();
    let records = found["records"].as_array().expect("a list");
    records.last().map(|last| last["says"].as_str().expect("a text").to_owned()).into_iter().collect()
}

#[test]
fn the_lock_goes_with_the_guest_and_keeps_it_from_running_twice() {
    let (shared, source, destination, third) = (Shared::new(), Host::new(), Host::new(), Host::new());
    let lock = shared.option();
    let running = source.run("tern", &[&lock]);
    assert!(take(&shared.path()).is_none(), "it is held while the guest runs");
    let ended = third.start(["run", "tern", &lock]).wait().expect_code(11);
    ended.says("is held by another process, last taken by process").says(&running.id().to_string());

    let receiving = destination.receive(&[&lock]);
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
    assert!(take(&shared.path()).is_none(), "it is held there");
    let ended = source.start(["run", "tern", "--new", &lock]).wait().expect_code(11);
    ended.says(&receiving.process.id().to_string());

    // The guest moves on from the destination, and the lock has another path.
    let link = shared.folder.path().join("link");
    std::os::unix::fs::symlink(shared.path(), &link).expect("a link can be made");
    let onward = third.receive(&[&option(&link)]);
    destination.migrate("tern", onward.address, &["--verify=full"]).wait().expect_code(0);
    receiving.process.wait().expect_code(0);
    runs_on(&third, "tern");
    onward.process.signal(libc::SIGKILL);
    onward.process.wait();
    // A process that dies releases the lock.
    drop(source.run("tern", &["--new", &lock]));
}

#[test]
fn one_that_no_process_of_both_ends_uses_is_refused_before_anything_is_sent() {
    let shared = Shared::new();
    let lock = shared.option();
    let at = |name: &str| shared.folder.path().join(name);
    let source = Host::new();
    let running = source.run("tern", &[&lock]);
    fs::copy(shared.path(), at("copy")).expect("it can be copied");
    let other = Host::new();
    let _gull = other.run("gull", &[&option(&at("other"))]);
    for (receive, reason) in [
        (vec![], "the source holds a lock for this guest and the destination has none"),
        (vec![option(&at("other"))], "is another file than the source's"),
        (vec![option(&at("copy"))], "is no arbiter"),
        (vec![option(&at("none"))], "cannot open the lock"),
    ] {
        let destination = Host::new();
        let receiving = destination.receive(&receive.iter().map(String::as_str).collect::<Vec<_>>());
        let ended = source.migrate("tern", receiving.address, &[]).wait().expect_code(11);
        ended.says(reason).says("where: the guest runs on at the source");
        runs_on(&source, "tern");
    }
    assert!(!at("none").exists());
    let without = Host::new();
    let _auk = without.run("auk", &[]);
    let destination = Host::new();
    let receiving = destination.receive(&[&lock]);
    let ended = without.migrate("auk", receiving.address, &[]).wait().expect_code(11);
    ended.says("the destination has a lock and the guest runs without one at the source");
    runs_on(&without, "auk");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");

    fs::write(at("disk"), vec![b'x'; 8192]).expect("it can be written");
    let ended = Host::new().start(["run", "tern", &option(&at("disk"))]).wait().expect_code(11);
    ended.says("is no lock file of sterna");
    Host::new().start(["receive", "--into=/tmp", &lock]).wait().expect_code(2);
}

/// A third party takes the lock at the moment in which neither end has it, and releases it at `until`.
fn thief(
    path: PathBuf,
    destination: SocketAddr,
    until: impl Fn(&Message) -> bool + Send + 'static,
) -> (SocketAddr, Arc<Mutex<Option<File>>>) {
    let stolen = Arc::<Mutex<Option<File>>>::default();
    let held = stolen.clone();
    let via = relay(destination, move |number, _, message| {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if number == 0 && matches!(message, Message::Go(_)) {
            *held = Some(take(&path).expect("the source gave it up before GO left"));
        }
        if until(message) {
            *held = None;
        }
        Fate::Pass
    });
    (via, stolen)
}

#[test]
fn a_destination_that_does_not_get_it_refuses_and_the_source_takes_it_again() {
    let (shared, source, destination) = (Shared::new(), Host::new(), Host::new());
    let lock = shared.option();
    let running = source.run("tern", &[&lock, "--dirty-rate=50"]);
    let receiving = destination.receive(&[&lock]);
    let (via, _stolen) =
        thief(shared.path(), receiving.address, |message| matches!(message, Message::Abort(..)));
    let ended = source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(10);
    ended.says("is held by another process").says("where: the guest runs on at the source");
    receiving.process.says("a guest did not arrive: the lock");
    runs_on(&source, "tern");
    source.checks_clean("tern");
    assert!(take(&shared.path()).is_none(), "the source has it again");
    assert_eq!(says(&source), ["REFUSED"]);
    assert_eq!(says(&destination), ["REFUSED"]);
    let how = ["--transport=tcp", "--verify=full"];
    source.migrate("tern", receiving.address, &how).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
    assert!(take(&shared.path()).is_none(), "the destination has it");
}

#[test]
fn a_source_that_does_not_get_it_back_stays_paused_whatever_it_is_told() {
    let (shared, source, destination) = (Shared::new(), Host::new(), Host::new());
    let lock = shared.option();
    let running = source.run("tern", &[&lock]);
    let receiving = destination.receive(&[&lock]);
    let (via, stolen) = thief(shared.path(), receiving.address, |_| false);
    let ended = source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(12);
    ended.says("stays paused: the lock").says("is held by another process");
    assert_eq!(source.status("tern")["phase"], "paused");
    let word = ["--resume-source", "--other-host-is-fenced"];
    let found = recover(&source, &word).expect_code(12).json();
    assert!(
        found["guest"].as_str().is_some_and(|text| text.contains("does not run here without")),
        "{found}"
    );
    assert_eq!(source.status("tern")["phase"], "paused");
    *stolen.lock().unwrap_or_else(PoisonError::into_inner) = None;
    wait_until("the source takes it back", || source.status("tern")["in_doubt"] == false);
    runs_on(&source, "tern");
    source.checks_clean("tern");
    assert!(take(&shared.path()).is_none());
    recover(&source, &[]).expect_code(0);
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn an_operators_word_counts_for_nothing_against_the_lock() {
    let (shared, source, destination) = (Shared::new(), Host::new(), Host::new());
    let lock = shared.option();
    let running = source.run("tern", &[&lock]);
    let receiving = destination.receive(&[&lock]);
    let open = Arc::new(AtomicBool::new(false));
    let (opened, victim) = (open.clone(), running.id());
    // GO is lost, and the source is killed.
    let via = relay(receiving.address, move |_, _, message| {
        if matches!(message, Message::Go(_)) && !opened.load(Ordering::Relaxed) {
            let killed = Command::new("kill").args(["-KILL", &victim.to_string()]).status();
            assert!(killed.expect("there is a kill").success());
            return Fate::Cut;
        }
        Fate::Pass
    });
    source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(12);
    running.wait();
    receiving.process.says("the guest is ready and held");
    // An operator without knowledge of the migration starts the guest anew on a third host.
    let third = Host::new();
    let anew = third.run("tern", &[&lock]);
    let word = ["--run-destination", "--other-host-is-fenced"];
    let found = recover(&destination, &word).expect_code(12).json();
    assert!(found["guest"].as_str().is_some_and(|text| text.contains("without its lock")), "{found}");
    assert_eq!(says(&destination), ["PREPARED"]);
    // An operator's word does not settle the doubt at the source either.
    receiving.process.signal(libc::SIGSTOP);
    let word_here = ["--resume-source", "--other-host-is-fenced", &lock];
    let found = recover(&source, &word_here).expect_code(12).json();
    assert!(found["guest"].as_str().is_some_and(|text| text.contains("without its lock")), "{found}");
    assert_eq!(says(&source), ["COMMITTED"]);
    receiving.process.signal(libc::SIGCONT);
    drop(anew);
    wait_until("the lock is free", || take(&shared.path()).is_some());
    recover(&destination, &word).expect_code(0);
    receiving.process.event("arrived");
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
    assert!(take(&shared.path()).is_none());
    open.store(true, Ordering::Relaxed);
    recover(&source, &[&lock]).expect_code(0);
}

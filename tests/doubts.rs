//! Links that are cut and processes that are killed during the handover: the guest runs on one host, or a
//! command reports where it may be; and the hosts find out by themselves whatever can be found out.
#![cfg(feature = "cli")]

mod common;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use common::{
    BUSY, ENDLESS, Ended, Fate, From, Host, Process, Receiving, moves_away_from, relay, runs_on, wait_until,
};
use serde_json::Value;
use sterna::wire::Message;

/// The message on the first control connection at which the fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Prepared,
    Go,
    Running,
}

impl At {
    fn is(self, message: &Message) -> bool {
        matches!(
            (self, message),
            (At::Prepared, Message::Prepared(..))
                | (At::Go, Message::Go(_))
                | (At::Running, Message::Running(_))
        )
    }
}

/// A guest on its way through a relay.
struct Crossing {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    via: SocketAddr,
    /// Whether questions of a source get through.
    open: Arc<AtomicBool>,
}

impl Crossing {
    /// Cuts the link at this message, which is lost; before that, sends SIGKILL to the process that `victim`
    /// names.
    fn new(at: At, receive: &[&str], victim: impl Fn(&Process, &Receiving) -> Option<i32>) -> Self {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &["--dirty-rate=50"]);
        let receiving = destination.receive(receive);
        let open = Arc::new(AtomicBool::new(true));
        let (victim, opened) = (AtomicI32::new(victim(&running, &receiving).unwrap_or(0)), open.clone());
        let via = relay(receiving.address, move |number, from, message| {
            if number > 0 {
                let asks = from == From::Source && matches!(message, Message::Ask(_));
                return if asks && !opened.load(Ordering::Relaxed) { Fate::Cut } else { Fate::Pass };
            }
            if !at.is(message) {
                return Fate::Pass;
            }
            match victim.swap(0, Ordering::Relaxed) {
                0 => {}
                process => kill(process),
            }
            // A source that receives PREPARED records COMMITTED; PREPARED passes so that it gets that far.
            if at == At::Prepared { Fate::Pass } else { Fate::Cut }
        });
        Self { source, running, destination, receiving, via, open }
    }

    fn migrate(&self) -> Process {
        self.source.migrate("tern", self.via, &["--transport=tcp", "--verify=full"])
    }
}

/// Starts `sterna receive` again, at the same address, after it was killed.
fn receive_again(host: &Host, receiving: &mut Receiving) {
    wait_until("the killed process has ended", || receiving.process.has_ended());
    let port = format!("--port={}", receiving.address.port());
    receiving.process = host.start(["receive", "--json", &port]);
    receiving.process.event("listening");
}

fn nobody(_: &Process, _: &Receiving) -> Option<i32> {
    None
}

fn the_destination(_: &Process, receiving: &Receiving) -> Option<i32> {
    Some(receiving.process.id())
}

fn the_source(running: &Process, _: &Receiving) -> Option<i32> {
    Some(running.id())
}

/// Through a shell: the process is another thread's child, and this thread has no handle on it.
fn kill(process: i32) {
    let killed = Command::new("kill").args(["-KILL", &process.to_string()]).status();
    assert!(killed.expect("there is a kill").success(), "{process} is not there any more");
    // Once it holds no socket and no lock, it is a zombie or gone.
    wait_until("the killed process has ended", || {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    });
}

fn recover(host: &Host, more: &[&str]) -> Ended {
    host.start(["recover", "tern", "--json"].iter().chain(more)).wait()
}

/// The last record of a host's guest.
fn says(found: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let records = found["records"].as_array().expect("a list");
    records.last().map(|last| (text(&last["side"]), text(&last["says"]))).into_iter().collect()
}

fn said(side: &str, mark: &str) -> (String, String) {
    (side.to_owned(), mark.to_owned())
}

/// Waits until the guest is not in doubt any more, and asserts that it runs at the source and can be moved.
#[track_caller]
fn is_kept(source: &Host, running: Process) {
    wait_until("the doubt is settled", || source.status("tern")["in_doubt"] == false);
    runs_on(source, "tern");
    source.checks_clean("tern");
    let found = recover(source, &[]).expect_code(0).json();
    assert!(found["guest"].as_str().is_some_and(|guest| guest.contains("runs here")), "{found}");
    assert_eq!(says(&found), [said("source", "REFUSED")]);
    moves_away_from(source, running, "tern", &["--verify=full"]);
}

#[test]
fn when_running_is_lost_the_source_asks_and_the_migration_succeeds() {
    let crossing = Crossing::new(At::Running, &[], nobody);
    let ended = crossing.migrate().wait().expect_code(0);
    ended.says("asking the destination what became of the guest");
    assert_eq!(ended.json()["status"], "completed");
    crossing.running.event("moved");
    crossing.running.wait().expect_code(0);
    runs_on(&crossing.destination, "tern");
    crossing.destination.checks_clean("tern");
    let found = recover(&crossing.source, &[]).expect_code(0).json();
    assert_eq!(says(&found), [said("source", "DONE")]);
    let found = recover(&crossing.destination, &[]).expect_code(0).json();
    assert_eq!(says(&found), [said("destination", "RUNNING")]);
    // The name is free again at the source, and the guest can move on from the destination.
    drop(crossing.source.run("tern", &["--new"]));
    moves_away_from(&crossing.destination, crossing.receiving.process, "tern", &[]);
}

#[test]
fn a_process_that_ends_while_it_is_asked_leaves_the_answer_to_the_journals() {
    let host = Host::new();
    let ending = UnixListener::bind(host.socket("tern")).expect("nobody else is there");
    fs::set_permissions(host.socket("tern"), Permissions::from_mode(0o600)).expect("it is ours");
    let ends = thread::spawn(move || {
        for _ in 0..2 {
            let (asking, _) = ending.accept().expect("it is asked");
            BufReader::new(asking).read_line(&mut String::new()).expect("it is asked something");
        }
    });
    let found = recover(&host, &[]).expect_code(11).json();
    assert!(found["guest"].as_str().is_some_and(|guest| guest.contains("is not known here")), "{found}");
    ends.join().expect("it was asked twice");
}

#[test]
fn when_go_is_lost_it_is_sent_again() {
    let crossing = Crossing::new(At::Go, &[], nobody);
    crossing.migrate().wait().expect_code(0).says("asking the destination");
    crossing.running.wait().expect_code(0);
    runs_on(&crossing.destination, "tern");
    crossing.destination.checks_clean("tern");
}

#[test]
fn a_destination_that_died_prepared_says_when_it_is_back_that_it_never_ran_the_guest() {
    let mut crossing = Crossing::new(At::Prepared, &[], the_destination);
    crossing.migrate().wait().expect_code(12).says("in doubt");
    assert_eq!(crossing.source.status("tern")["phase"], "paused");
    let found = recover(&crossing.source, &[]).expect_code(12).json();
    assert_eq!(says(&found), [said("source", "COMMITTED")]);
    crossing.migrate().wait().expect_code(12).says("an earlier migration of this guest is in doubt");
    crossing.source.start(["cancel", "tern"]).wait().expect_code(12);
    assert_eq!(crossing.source.ask("tern", "stop")["answer"], "failed", "not what may be the only one");

    receive_again(&crossing.destination, &mut crossing.receiving);
    is_kept(&crossing.source, crossing.running);
    let found = recover(&crossing.destination, &[]).expect_code(10).json();
    assert_eq!(says(&found), [said("destination", "REFUSED")]);
}

#[test]
fn a_destination_that_died_running_says_when_it_is_back_that_it_ran_the_guest() {
    let mut crossing = Crossing::new(At::Running, &[], the_destination);
    let migrating = crossing.migrate();
    receive_again(&crossing.destination, &mut crossing.receiving);
    // By the journal: at that moment the guest does not run at the destination, which proves nothing.
    crossing.running.event("moved");
    crossing.running.wait().expect_code(0);
    let code = migrating.wait().code;
    assert!([Some(0), Some(12)].contains(&code), "within its time or after it: {code:?}");
    let found = recover(&crossing.destination, &[]).expect_code(13).json();
    assert_eq!(says(&found), [said("destination", "RUNNING")]);
}

#[test]
fn a_source_that_died_committed_is_recovered_and_its_guest_runs() {
    let crossing = Crossing::new(At::Go, &[], the_source);
    crossing.migrate().wait().expect_code(12);
    crossing.running.wait();
    crossing.receiving.process.says("the guest is ready and held");
    let ended = crossing.source.start(["run", "tern"]).wait().expect_code(11);
    ended.says("may run there").says("sterna recover NAME");

    crossing.open.store(false, Ordering::Relaxed);
    recover(&crossing.source, &[]).expect_code(12);
    crossing.open.store(true, Ordering::Relaxed);
    let found = recover(&crossing.source, &[]).expect_code(0).json();
    assert_eq!(says(&found), [said("source", "DONE")]);
    crossing.receiving.process.event("arrived");
    runs_on(&crossing.destination, "tern");
    crossing.destination.checks_clean("tern");
    moves_away_from(&crossing.destination, crossing.receiving.process, "tern", &["--verify=full"]);
}

#[test]
fn a_source_and_a_destination_that_both_died_leave_a_guest_that_may_be_started_anew() {
    let mut crossing = Crossing::new(At::Go, &[], the_source);
    crossing.migrate().wait().expect_code(12);
    crossing.running.wait();
    crossing.receiving.process.signal(libc::SIGKILL);
    recover(&crossing.source, &[]).expect_code(12);
    recover(&crossing.source, &["--resume-source"]).expect_code(2);
    receive_again(&crossing.destination, &mut crossing.receiving);
    let found = recover(&crossing.source, &[]).expect_code(13).json();
    assert_eq!(says(&found), [said("source", "REFUSED")]);
    drop(crossing.source.run("tern", &[]));
}

#[test]
fn a_guest_that_is_held_in_vain_is_given_up_and_runs_on_at_the_source() {
    let crossing = Crossing::new(At::Go, &["--takeover-timeout=1"], nobody);
    crossing.open.store(false, Ordering::Relaxed);
    let migrating = crossing.migrate();
    crossing.receiving.process.says("a guest did not arrive: the guest was ready and held for 1 s");
    crossing.open.store(true, Ordering::Relaxed);
    let code = migrating.wait().code;
    assert!([Some(10), Some(12)].contains(&code), "within its time or after it: {code:?}");
    is_kept(&crossing.source, crossing.running);
}

#[test]
fn a_guest_that_is_held_runs_on_the_operators_word_and_only_on_that() {
    let crossing = Crossing::new(At::Go, &[], the_source);
    crossing.migrate().wait().expect_code(12);
    let destination = &crossing.destination;
    crossing.receiving.process.says("the guest is ready and held");
    let found = recover(destination, &[]).expect_code(12).json();
    assert!(found["guest"].as_str().is_some_and(|guest| guest.contains("ready to run")), "{found}");
    assert_eq!(says(&found), [said("destination", "PREPARED")]);
    recover(destination, &["--run-destination"]).expect_code(2).says("--other-host-is-fenced");

    let other = Host::new();
    let _gull = other.run("gull", &[]);
    let ended = other.migrate("gull", crossing.receiving.address, &[]).wait().expect_code(11);
    ended.says("another guest is arriving");
    runs_on(&other, "gull");

    recover(destination, &["--run-destination", "--other-host-is-fenced"]).expect_code(0);
    crossing.receiving.process.event("arrived");
    runs_on(destination, "tern");
    destination.checks_clean("tern");
    let found = recover(&crossing.source, &[]).expect_code(0).json();
    assert_eq!(says(&found), [said("source", "DONE")]);
    recover(destination, &["--run-destination", "--other-host-is-fenced"]).expect_code(0);
}

#[test]
fn a_guest_in_doubt_is_resumed_on_the_operators_word_and_only_on_that() {
    let crossing = Crossing::new(At::Prepared, &[], the_destination);
    crossing.migrate().wait().expect_code(12);
    recover(&crossing.source, &["--resume-source"]).expect_code(2).says("--other-host-is-fenced");
    assert_eq!(crossing.source.status("tern")["in_doubt"], true);
    recover(&crossing.source, &["--resume-source", "--other-host-is-fenced"]).expect_code(0);
    is_kept(&crossing.source, crossing.running);
}

#[test]
fn a_word_is_not_taken_where_the_destination_can_be_asked() {
    let crossing = Crossing::new(At::Running, &[], nobody);
    crossing.open.store(false, Ordering::Relaxed);
    crossing.migrate().wait().expect_code(12);
    crossing.open.store(true, Ordering::Relaxed);
    // The operator is wrong: the guest runs at the destination.
    let word = recover(&crossing.source, &["--resume-source", "--other-host-is-fenced"]).expect_code(0);
    assert!(word.stdout.contains("another host") || word.stdout.contains("runs at"), "{word:?}");
    crossing.running.wait().expect_code(0);
    runs_on(&crossing.destination, "tern");
    crossing.destination.checks_clean("tern");
}

#[test]
fn a_state_that_cannot_be_kept_is_refused_before_anything_is_sent() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let receiving = destination.receive(&[]);
    let refused = |reason: &str| {
        let ended = source.migrate("tern", receiving.address, &[]).wait().expect_code(11);
        ended.says("the destination cannot record what becomes of the guest").says(reason);
        ended.says("where: the guest runs on at the source");
        runs_on(&source, "tern");
    };
    for (file, reason) in [
        ("tern.state", "it is no state file of sterna"),
        ("tern.destination.journal", "written by an earlier version of sterna"),
    ] {
        let path = destination.state().join(file);
        fs::write(&path, vec![b'x'; 4096]).expect("the folder is there");
        refused(reason);
        recover(&destination, &[]).expect_code(11).says(reason);
        destination.start(["run", "tern"]).wait().expect_code(11).says(reason);
        fs::remove_file(path).expect("it was just made");
    }
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    // Damages both copies of records that were whole.
    let path = destination.state().join("tern.state");
    let mut bytes = fs::read(&path).expect("there is one");
    for copy in [3, 4, 5, 6] {
        bytes[4096 * copy - 4096 + 70] ^= 1;
    }
    let file = fs::File::options().write(true).open(&path).expect("it can be written");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).expect("it can be written");
    // The process that has the guest knows its state, and moves it on.
    recover(&destination, &[]).expect_code(0).says("damaged");
    let (_, process) = moves_away_from(&destination, receiving.process, "tern", &[]);
    drop(process);
    recover(&destination, &[]).expect_code(11).says("damaged");
}

#[test]
fn a_folder_that_can_hold_no_state_is_refused_at_once() {
    let host = Host::new();
    for command in [&["run", "tern"][..], &["receive", "--port=0"], &["recover", "tern"]] {
        let ended = host.start(command.iter().chain(&["--state-dir=/dev/null/state"])).wait().expect_code(11);
        ended.says("/dev/null").says("--state-dir");
    }
    host.start(["recover", "tern"]).wait().expect_code(11);
}

#[test]
fn a_state_that_was_damaged_on_its_way_is_not_loaded() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--dirty-rate=50"]);
    let receiving = destination.receive(&[]);
    let via = relay(receiving.address, |number, _, message| match message {
        Message::State(_) if number == 0 => Fate::Damage,
        _ => Fate::Pass,
    });
    let ended = source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(10);
    ended.says("a message was damaged on its way").says("where: the guest runs on at the source");
    receiving.process.says("a message was damaged on its way");
    runs_on(&source, "tern");
    source.checks_clean("tern");
    source.migrate("tern", via, &["--transport=tcp", "--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// Loses this message of the destination and cancels the migration while it awaits the message. Without the
/// cancel, the wait would end as a failure of the destination.
#[track_caller]
fn is_cancelled_while_it_awaits(what: fn(&Message) -> bool, how: &[&str]) {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--dirty-rate=50"]);
    let receiving = destination.receive(&[]);
    let awaited = Arc::new(AtomicBool::new(false));
    let seen = awaited.clone();
    let via = relay(receiving.address, move |_, from, message| {
        if from == From::Source || !what(message) {
            return Fate::Pass;
        }
        seen.store(true, Ordering::Relaxed);
        Fate::Lose
    });
    let migrating = source.migrate("tern", via, how);
    wait_until("the destination has said it", || awaited.load(Ordering::Relaxed));
    source.start(["cancel", "tern"]).wait().expect_code(0);
    migrating.wait().expect_code(130).says("cancelled");
    runs_on(&source, "tern");
    source.checks_clean("tern");
    receiving.process.says("the source gave up: cancelled");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

#[test]
fn a_migration_is_cancelled_while_prepared_is_awaited() {
    is_cancelled_while_it_awaits(|message| matches!(message, Message::Prepared(..)), &["--transport=tcp"]);
}

#[test]
fn a_migration_is_cancelled_while_the_destination_prepares_or_compares() {
    is_cancelled_while_it_awaits(|message| matches!(message, Message::Ready(..)), &["--transport=tcp"]);
    let compares = |message: &Message| matches!(message, Message::Checked(_));
    is_cancelled_while_it_awaits(compares, &["--transport=tcp", "--verify=final"]);
}

#[test]
fn a_migration_is_cancelled_while_it_connects_and_while_nobody_takes_its_pages() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY, "--memory=64M"]);
    // The kernel accepts connections for the listener, which never sends a byte.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let migrating = source.migrate("tern", silent.local_addr().expect("it is bound"), &[]);
    let _connection = silent.accept().expect("the source comes");
    source.start(["cancel", "tern"]).wait().expect_code(0);
    migrating.wait().expect_code(130);
    runs_on(&source, "tern");

    let receiving = destination.receive(&[]);
    let how = [&ENDLESS[..], &["--transport=tcp"]].concat();
    let migrating = source.migrate("tern", receiving.address, &how);
    migrating.says("round 1:");
    // From now on the destination's kernel accepts what fits into its buffers, and acknowledges it.
    receiving.process.signal(libc::SIGSTOP);
    thread::sleep(Duration::from_millis(500));
    source.start(["cancel", "tern"]).wait().expect_code(0);
    migrating.wait().expect_code(130);
    runs_on(&source, "tern");
    source.checks_clean("tern");
    receiving.process.signal(libc::SIGCONT);
    receiving.process.says("a guest did not arrive");
    let left = fs::read_dir(destination.state()).expect("the folder is there").count();
    assert_eq!(left, 0, "what came to nothing leaves nothing behind");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn a_migration_is_cancelled_until_the_guest_is_given_away_and_not_after() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = destination.receive(&[]);
    source.start(["cancel", "tern"]).wait().expect_code(10).says("no migration of this guest is under way");
    let migrating = source.migrate("tern", receiving.address, &ENDLESS);
    migrating.says("round 1:");
    let ended = source.start(["cancel", "tern"]).wait().expect_code(0);
    assert!(ended.stdout.contains("running here"), "{ended:?}");
    migrating.wait().expect_code(130);
    runs_on(&source, "tern");

    // GO is in flight until the test lets it arrive.
    let (sent, arrives) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (seen, until) = (sent.clone(), arrives.clone());
    let via = relay(receiving.address, move |_, _, message| {
        if matches!(message, Message::Go(_)) {
            seen.store(true, Ordering::Relaxed);
            while !until.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        Fate::Pass
    });
    let migrating = source.migrate("tern", via, &["--transport=tcp", "--if-stuck=stop", "--max-rounds=2"]);
    wait_until("GO is sent", || sent.load(Ordering::Relaxed));
    source.start(["cancel", "tern"]).wait().expect_code(12).says("too late");
    arrives.store(true, Ordering::Relaxed);
    migrating.wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

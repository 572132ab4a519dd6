//! Which host owns a guest, whatever an operator does: starting it twice, asking from another login, or
//! giving a false word.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{
    Ended, Fate, From, Host, Process, moves_away_from, never_runs_twice, relay, runs_on, wait_until,
};
use serde_json::Value;
use sterna::handover::RecordKind;
use sterna::wire::{Message, Outcome};

const WORD: [&str; 2] = ["--resume-source", "--other-host-is-fenced"];

fn recover(host: &Host, more: &[&str]) -> Ended {
    host.start(["recover", "tern", "--json"].iter().chain(more)).wait()
}

/// The text of `recover` about the guest.
fn guest(found: &Ended) -> String {
    found.json()["guest"].as_str().expect("a text").to_owned()
}

fn run(host: &Host, more: &[&str]) -> Process {
    host.start(["run", "tern", "--json", "--memory=16M", "--machine=synthetic"].iter().chain(more))
}

/// A guest that was given away; its destination is ready and has not received GO. No message from the
/// destination that says that the guest runs gets through until `open` is set, and no question before `asks`.
#[test]
fn an_operators_word_that_the_destination_contradicts_hands_out_no_go_and_is_not_taken() {
    for source_dies in [false, true] {
        let (source, destination) = (Host::new(), Host::new());
        let mut running = source.run("tern", &["--dirty-rate=50"]);
        let receiving = destination.receive(&[]);
        let (asks, open) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (may_ask, is_open) = (asks.clone(), open.clone());
        let via = relay(receiving.address, move |number, from, message| {
            let open = is_open.load(Ordering::Relaxed);
            let runs = matches!(message, Message::Running(_) | Message::Outcome(_, Outcome::Running));
            match (number, from, message) {
                (0, From::Source, Message::Go(_)) => Fate::Cut,
                (0, ..) => Fate::Pass,
                (_, From::Source, Message::Ask(_)) if !may_ask.load(Ordering::Relaxed) => Fate::Cut,
                _ if runs && !open => Fate::Cut,
                _ => Fate::Pass,
            }
        });
        never_runs_twice("tern", (&source, &destination), || {
            source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(12);
            receiving.process.says("the guest is ready and held");
            if source_dies {
                running.signal(libc::SIGKILL);
                wait_until("the source's process has ended", || running.has_ended());
            }
            asks.store(true, Ordering::Relaxed);
            // Without a process no other question interferes, and the answer is certain: "ready".
            let word = recover(&source, &WORD);
            let contradicted =
                word.code == Some(12) && guest(&word).contains("is not fenced, because it answered");
            assert!(contradicted || !source_dies && word.code == Some(12), "{word:#?}");
            if source_dies {
                assert_eq!(destination.last_record("tern"), Some(RecordKind::Prepared), "no GO has come");
            }
            // Now the question may be answered, and gives the guest away again.
            open.store(true, Ordering::Relaxed);
            if source_dies {
                recover(&source, &[]).expect_code(0);
            } else {
                wait_until("the source hears that it runs there", || running.has_ended());
            }
            receiving.process.event("arrived");
            runs_on(&destination, "tern");
            destination.checks_clean("tern");
        });
        assert_eq!(source.last_record("tern"), Some(RecordKind::Done));
    }
}

/// A fenced host accepts no connection.
#[test]
fn a_connection_that_is_taken_is_a_sign_of_life_and_voids_an_operators_word() {
    let (source, destination) = (Host::new(), Host::new());
    let _running = source.run("tern", &["--dirty-rate=50"]);
    let receiving = destination.receive(&[]);
    let via = relay(receiving.address, |_, _, message| match message {
        Message::Go(_) | Message::Ask(_) => Fate::Cut,
        _ => Fate::Pass,
    });
    source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(12);
    assert!(guest(&recover(&source, &WORD).expect_code(12)).contains("is not fenced"));
    assert_eq!(source.status("tern")["phase"], "paused");
    assert_eq!(source.last_record("tern"), Some(RecordKind::Committed), "the word is not recorded");
}

#[test]
fn a_guest_that_lives_is_found_and_not_started_again_from_another_login() {
    let host = Host::new();
    let running = host.run("tern", &[]);
    let login = host.login();
    let found = recover(&login, &[]).expect_code(0);
    assert_eq!(found.json()["process"], true);
    assert!(guest(&found).contains("runs here"), "{found:#?}");
    let refused = run(&login, &[]).wait().expect_code(11);
    refused.says("has the guest tern").says(&format!("process {}", running.id()));
    run(&login, &["--new"]).wait().expect_code(11);
    // Remove the control socket, as a logout does.
    fs::remove_file(host.socket("tern")).expect("it is there");
    for asking in [&host, &login] {
        let found = recover(asking, &[]).expect_code(0);
        assert!(guest(&found).contains("runs here"), "{found:#?}");
        run(asking, &[]).wait().expect_code(11);
    }
    drop(running);
    let found = recover(&login, &[]).expect_code(13);
    assert_eq!(found.json()["process"], false);
    let again = run(&login, &[]);
    again.event("running");
}

#[test]
fn of_two_starts_of_one_name_at_once_one_wins() {
    for round in 0..6 {
        let host = Host::new();
        let other = if round % 2 == 0 { host.login() } else { Host::new() };
        let at = if round % 2 == 0 { &other } else { &host };
        let starts = [run(&host, &[]), run(at, &[])];
        wait_until("one of them is refused", || {
            host.sighting("tern").is_some_and(|sighting| sighting.holder.is_some())
        });
        let [mut first, mut second] = starts;
        wait_until("one of them ends", || first.has_ended() || second.has_ended());
        let (loser, winner) = if first.has_ended() { (first, second) } else { (second, first) };
        loser.wait().expect_code(11);
        winner.event("running");
    }
}

#[test]
fn a_guest_that_came_back_and_crashed_is_known_to_have_run_here_last() {
    let (a, b) = (Host::new(), Host::new());
    let running = a.run("tern", &[]);
    let at_b = b.receive(&[]);
    a.migrate("tern", at_b.address, &[]).wait().expect_code(0);
    running.wait().expect_code(0);
    at_b.process.event("arrived");
    assert!(guest(&recover(&a, &[]).expect_code(0)).contains("has moved"), "after it left");

    // The guest is at b: no guest with its name starts at a, unless the operator says that it is another
    // guest.
    let refused = run(&a, &[]).wait().expect_code(11);
    refused.says("the guest tern is at").says("--new");

    let at_a = a.receive(&[]);
    b.migrate("tern", at_a.address, &[]).wait().expect_code(0);
    at_b.process.wait().expect_code(0);
    at_a.process.event("arrived");
    wait_until("it is known that it runs here", || a.status("tern")["phase"] == "running");
    assert!(guest(&recover(&a, &[]).expect_code(0)).contains("runs here"));
    at_a.process.signal(libc::SIGKILL);
    at_a.process.wait();
    let found = recover(&a, &[]).expect_code(13);
    assert!(guest(&found).contains("has run here since it came from"), "{found:#?}");
    let marks: Vec<_> = found.json()["records"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|record| record["says"].clone())
        .collect();
    assert_eq!(marks, ["STARTED", "COMMITTED", "DONE", "PREPARED", "RUNNING"]);
    assert!(guest(&recover(&b, &[]).expect_code(0)).contains("has moved"));
    drop(run(&a, &[]));
}

#[test]
fn a_new_guest_takes_over_the_name_of_one_that_moved() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[]);
    let receiving = destination.receive(&[]);
    source.migrate("tern", receiving.address, &[]).wait().expect_code(0);
    running.wait().expect_code(0);
    let address = recover(&source, &[]).expect_code(0).json()["records"][1]["address"].clone();
    assert_eq!(address, Value::from(receiving.address.to_string()), "the address that answered is recorded");
    run(&source, &[]).wait().expect_code(11);
    let another = source.run("tern", &["--new"]);
    another.signal(libc::SIGKILL);
    another.wait();
    let found = recover(&source, &[]).expect_code(13);
    assert!(guest(&found).contains("may be started anew"), "{found:#?}");
    let another = source.run("tern", &[]);
    moves_away_from(&source, another, "tern", &[]);
}

#[test]
fn from_running_on_a_destination_is_never_said_to_wait_for_its_source() {
    for _ in 0..5 {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &["--dirty-rate=0"]);
        let receiving = destination.receive(&[]);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let mut asked = 0;
                while !over.load(Ordering::Relaxed) {
                    let runs = destination.last_record("tern") == Some(RecordKind::Running);
                    let found = destination.try_ask(
                        "tern",
                        &serde_json::json!({ "do": "recover", "resume_source": false, "run_destination": false }),
                    );
                    if let Some(what) = found.as_ref().and_then(|found| found["what"].as_str()) {
                        assert!(!runs || !what.contains("runs at the source"), "RUNNING is recorded: {what}");
                        asked += 1;
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                asked
            });
            source.migrate("tern", receiving.address, &[]).wait().expect_code(0);
            running.wait().expect_code(0);
            receiving.process.event("arrived");
            runs_on(&destination, "tern");
            over.store(true, Ordering::Relaxed);
            assert!(asking.join().expect("no answer was wrong") > 0, "it was asked");
        });
    }
}

/// The source's disk takes neither COMMITTED nor REFUSED, and the link is then cut.
#[test]
fn a_guest_whose_handover_cannot_be_recorded_stays_paused_until_it_can() {
    let source = Host::under(&["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]);
    let running = source.run("tern", &["--dirty-rate=50"]);
    let destination = Host::new();
    let receiving = destination.receive(&[]);
    let via = relay(receiving.address, |number, from, message| match (number, from, message) {
        (0, From::Source, Message::Abort(..)) => Fate::Cut,
        (0, ..) => Fate::Pass,
        _ => Fate::Cut,
    });
    let migrating = source.migrate("tern", via, &[&common::ENDLESS[..], &["--transport=tcp"]].concat());
    migrating.says("round 1:");
    Host::forbid_writes(&running);
    source.start(["migrate", "tern", "--set=if-stuck=stop", "--set=max-rounds=1"]).wait().expect_code(0);
    let ended = migrating.wait().expect_code(12);
    ended.says("the guest was not given away, and stays paused");
    let status = source.status("tern");
    assert_eq!((&status["phase"], &status["in_doubt"]), (&Value::from("paused"), &Value::from(true)));
    assert_ne!(source.last_record("tern"), Some(RecordKind::Refused));
    // An operator's word does not replace the record.
    recover(&source, &WORD).expect_code(12);
    assert_eq!(source.status("tern")["phase"], "paused");
    Host::allow_writes(&running);
    wait_until("the guest runs on", || source.phase("tern").as_deref() == Some("running"));
    assert_eq!(source.last_record("tern"), Some(RecordKind::Refused));
    runs_on(&source, "tern");
    source.checks_clean("tern");
}

/// The same, but the destination can be reached: its record suffices.
#[test]
fn a_destination_that_refuses_gives_a_guest_back_whose_source_cannot_record_that() {
    let source = Host::under(&["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]);
    let running = source.run("tern", &["--dirty-rate=50"]);
    let destination = Host::new();
    let receiving = destination.receive(&[]);
    let migrating =
        source.migrate("tern", receiving.address, &[&common::ENDLESS[..], &["--transport=tcp"]].concat());
    migrating.says("round 1:");
    Host::forbid_writes(&running);
    source.start(["migrate", "tern", "--set=if-stuck=stop", "--set=max-rounds=1"]).wait().expect_code(0);
    migrating.wait().expect_code(10).says("cannot write to the state file");
    runs_on(&source, "tern");
    assert_eq!(destination.last_record("tern"), Some(RecordKind::Refused));
    Host::allow_writes(&running);
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

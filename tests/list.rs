//! `sterna list`: each guest of a host once, in the state that it is in.
#![cfg(feature = "cli")]

mod common;

use common::{BUSY, ENDLESS, Fate, Host, relay, runs_on, wait_until};
use serde_json::{Value, json};
use sterna::wire::Message;

/// The guests of a host.
fn list(host: &Host, more: &[&str]) -> Vec<Value> {
    let listed = host.start(["list", "--json"].iter().chain(more)).wait().expect_code(0).json();
    listed["guests"].as_array().expect("a list").clone()
}

/// The names and states of a host's guests.
fn states(host: &Host, more: &[&str]) -> Vec<(String, String)> {
    let word = |value: &Value| value.as_str().expect("a word").to_owned();
    list(host, more).iter().map(|guest| (word(&guest["name"]), word(&guest["state"]))).collect()
}

fn are(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(name, state)| (name.to_owned(), state.to_owned())).collect()
}

#[test]
fn a_guest_is_listed_once_at_each_host_that_has_to_do_with_it() {
    let (source, destination) = (Host::new(), Host::new());
    assert_eq!(list(&source, &["--all"]), [] as [Value; 0]);
    let tern = source.run("tern", &[BUSY]);
    let gull = source.run("gull", &["--machine=synthetic", "--memory=20M"]);
    assert_eq!(states(&source, &[]), are(&[("gull", "running"), ("tern", "running")]));
    let guests = list(&source, &[]);
    let gull_is = json!({
        "name": "gull", "state": "running", "process": gull.id(), "peer": null, "kind": "synthetic",
        "memory_bytes": 20 << 20, "vcpus": 1, "insecure": false,
    });
    assert_eq!(guests[0], gull_is);
    let table = source.start(["list"]).wait().expect_code(0).stdout;
    let (head, row) = (table.lines().next().expect("a head"), table.lines().nth(1).expect("a row"));
    assert!(head.starts_with("NAME  STATE    MEMORY  VCPUS  KIND"), "{table}");
    assert!(row.starts_with("gull  running  20 MiB  1      synthetic"), "{table}");

    let receiving = destination.receive(&[]);
    let migrating = source.migrate("tern", receiving.address, &ENDLESS);
    wait_until("the guest is on its way", || {
        states(&destination, &[]) == are(&[("tern", "arriving")])
            && states(&source, &[]) == are(&[("gull", "running"), ("tern", "migrating")])
    });
    source.start(["cancel", "tern"]).wait().expect_code(0);
    migrating.wait();
    wait_until("the destination has nothing left", || list(&destination, &["--all"]).is_empty());

    source.migrate("tern", receiving.address, &[]).wait().expect_code(0);
    tern.wait().expect_code(0);
    receiving.process.event("arrived");
    runs_on(&destination, "tern");
    assert_eq!(states(&destination, &[]), are(&[("tern", "running")]));
    assert_eq!(states(&source, &[]), are(&[("gull", "running")]));
    assert_eq!(states(&source, &["--all"]), are(&[("gull", "running"), ("tern", "moved")]));
}

#[test]
fn a_guest_in_doubt_is_listed_also_after_its_process_has_died() {
    let (source, destination) = (Host::new(), Host::new());
    let mut running = source.run("tern", &[]);
    let receiving = destination.receive(&[]);
    let via = relay(receiving.address, |number, _, message| match (number, message) {
        (0, Message::Go(_)) => Fate::Cut,
        (0, _) => Fate::Pass,
        _ => Fate::Cut,
    });
    source.migrate("tern", via, &["--transport=tcp"]).wait().expect_code(12);
    receiving.process.says("the guest is ready and held");
    assert_eq!(states(&destination, &[]), are(&[("tern", "kept")]));
    assert_eq!(states(&source, &[]), are(&[("tern", "in-doubt")]));
    running.signal(libc::SIGKILL);
    wait_until("the source's process has ended", || running.has_ended());
    let left = list(&source, &[]);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!((&left[0]["state"], &left[0]["process"]), (&json!("in-doubt"), &Value::Null));
    assert!(left[0]["peer"].is_string(), "{left:?}");
}

#[test]
fn a_process_that_hangs_is_listed_and_hides_no_other() {
    let host = Host::new();
    let hangs = host.run("tern", &["--machine=synthetic"]);
    let mut killed = host.run("gull", &["--machine=synthetic"]);
    let _runs = host.run("auk", &["--machine=synthetic"]);
    hangs.signal(libc::SIGSTOP);
    killed.signal(libc::SIGKILL);
    wait_until("the other has ended", || killed.has_ended());
    assert_eq!(states(&host, &[]), are(&[("auk", "running"), ("tern", "no-answer")]));
    let all = [("auk", "running"), ("gull", "ended"), ("tern", "no-answer")];
    assert_eq!(states(&host, &["--all"]), are(&all));
}

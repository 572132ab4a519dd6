//! `sterna demo`: one command shows a whole migration, and judges it.
#![cfg(feature = "cli")]

mod common;

use common::{BUSY, ENDLESS, Host, PATIENT, machine_word, wait_until};
use serde_json::Value;
use sterna::host;

/// Runs the command with `--json`; asserts that it succeeded and that its report is complete and sound.
#[track_caller]
fn demo(arguments: &[&str]) -> Value {
    let machine = format!("--machine={}", machine_word());
    let mut words = vec!["demo", "--json"];
    words.extend(arguments);
    if !arguments.contains(&"--machine=synthetic") {
        words.push(&machine);
    }
    if !arguments.iter().any(|word| word.starts_with("--downtime-limit")) {
        words.push(PATIENT);
    }
    let report = Host::new().start(words).wait().expect_code(0).json();
    assert_sound(&report);
    report
}

#[track_caller]
fn assert_sound(report: &Value) {
    assert_eq!(report["status"], "completed", "{report}");
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("`{key}` is missing in {report}"));
    for key in
        ["total_ms", "setup_ms", "first_byte_ms", "downtime_ms", "guest_downtime_ms", "throughput_mbps"]
    {
        assert!(number(key) > 0.0, "{key} in {report}");
    }
    assert!(number("setup_ms") <= number("first_byte_ms"), "{report}");
    assert!(number("first_byte_ms") <= number("total_ms"), "{report}");
    assert!(number("downtime_ms") <= number("total_ms"), "{report}");
    assert!(number("pages_zero") >= 0.0);
    assert_eq!(number("wrong_pages"), 0.0, "{report}");
    assert!(number("checked_pages") > 0.0, "the guest looked itself: {report}");
    assert!(number("heartbeats_after") > number("heartbeats_before"), "{report}");

    let rounds = report["per_round"].as_array().expect("each round is told");
    assert_eq!(number("rounds"), f64::from(u32::try_from(rounds.len()).expect("a few rounds")));
    assert!(rounds.len() > 1, "the last round is sent while the guest is paused: {report}");
    let sum = |key: &str| -> u64 { rounds.iter().map(|round| round[key].as_u64().expect("a count")).sum() };
    assert_eq!(report["pages_sent"], sum("pages"));
    assert_eq!(report["bytes_sent"], sum("bytes"));
    assert_eq!(sum("bytes"), sum("pages") * 4096);
    let predicted = report["downtime_predicted"]["total_ms"].as_f64();
    assert!(predicted > Some(0.0) && report["predicted_downtime_ms"].as_f64() == predicted, "{report}");
    let measured = report["downtime_measured"].as_object().expect("the downtime is told by parts");
    let part =
        |name: &str| measured[name].as_f64().unwrap_or_else(|| panic!("`{name}` is missing in {report}"));
    let parts: f64 = measured.keys().filter(|&name| name != "total_ms").map(|name| part(name)).sum();
    assert!((parts - number("downtime_ms")).abs() < 0.1, "the parts are all of it: {report}");
    for round in rounds {
        let lanes = round["lanes"].as_array().expect("each lane is told");
        let bytes: Option<u64> = lanes.iter().map(|lane| lane["bytes"].as_u64()).sum();
        assert_eq!(round["bytes"].as_u64(), bytes, "{round}");
        assert!(round["ms"].as_f64() > Some(0.0), "{round}");
        assert!(round["dirty_rate_mbps"].as_f64() >= Some(0.0), "{round}");
    }
}

#[test]
fn a_guest_moves_and_every_page_of_it_is_compared() {
    let report = demo(&["--memory=16M"]);
    assert_eq!(report["machine"], machine_word());
    assert_eq!(report["verified_pages"], (16 << 20) / 4096);
}

#[test]
fn a_guest_with_four_vcpus_moves() {
    demo(&["--memory=16M", "--cpus=4"]);
}

#[test]
fn an_idle_guest_moves() {
    demo(&["--memory=16M", "--dirty-rate=0"]);
}

#[test]
fn a_synthetic_guest_moves() {
    let report = demo(&["--memory=16M", "--machine=synthetic", "--transport=tcp"]);
    assert_eq!(report["machine"], "synthetic");
    assert_eq!(report["transport"], "tcp");
}

#[test]
fn a_guest_with_a_small_working_set_does_not_send_what_it_never_touched() {
    let report = demo(&["--memory=64M", "--working-set=1M"]);
    assert_eq!(report["verified_pages"], (64 << 20) / 4096, "untouched pages are compared all the same");
    assert!(report["pages_zero"].as_u64() > Some(60 << 8), "{report}");
}

#[test]
fn a_guest_with_ram_above_the_hole_below_4_gib_moves() {
    // Most of the RAM is never touched, and so costs next to nothing.
    let needed_bytes = 5 << 30;
    if host::available_memory_bytes().is_none_or(|available| available < needed_bytes) {
        println!("skipped: this machine has less than 5 GiB of memory available");
        return;
    }
    let report = demo(&["--memory=5G", "--working-set=8M", "--transport=tcp"]);
    assert_eq!(report["verified_pages"], needed_bytes / 4096);
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_takes_several_rounds() {
    // A round takes two seconds, in which the guest writes more than the downtime allows, even with a small
    // share of a busy processor. However fast the guest is, throttling has a last step.
    let how =
        ["--downtime-limit=500", "--bandwidth-limit=4", "--if-stuck=throttle,stop", "--throttle-max=20"];
    let report = demo(&[&["--memory=64M", "--working-set=8M", BUSY][..], &how].concat());
    assert!(report["rounds"].as_u64() > Some(2), "{report}");
    assert_eq!(report["verified_pages"], (64 << 20) / 4096);
}

#[test]
fn a_guest_whose_writes_are_listed_in_rings_moves_as_well() {
    if machine_word() != "kvm" {
        println!("skipped: only a guest on KVM has dirty rings");
        return;
    }
    // The shortest ring fills again and again while 64 MiB are sent, and while the later rounds are.
    for entries in ["1024", "65536"] {
        let ring = format!("--dirty-ring-entries={entries}");
        let how = [
            "--memory=64M",
            "--dirty-rate=50",
            "--bandwidth-limit=200",
            "--cpus=2",
            "--dirty-log=ring",
            &ring,
        ];
        let arguments = ["demo", "--json", "--machine=kvm", "--if-stuck=throttle,stop"];
        let ended = Host::new().start([&arguments[..], &how].concat()).wait();
        if ended.stderr.contains("KVM of this host has dirty rings of") {
            println!("skipped: {}", ended.stderr);
            return;
        }
        let report = ended.expect_code(0).json();
        assert_sound(&report);
        assert_eq!(report["verified_pages"], (64 << 20) / 4096);
    }
}

#[test]
fn rings_are_refused_where_there_can_be_none() {
    let host = Host::new();
    for (wrong, what) in [
        (&["--machine=synthetic", "--dirty-log=ring"][..], "a synthetic machine has no dirty ring"),
        (&["--machine=synthetic", "--dirty-ring-entries=1024"], "is for --dirty-log ring"),
    ] {
        host.start([&["run", "tern", "--memory=16M"], wrong].concat()).wait().expect_code(2).says(what);
    }
}

#[test]
fn a_quiet_guest_is_compared_while_it_runs() {
    let report = demo(&["--memory=64M", "--dirty-rate=0", "--verify=final"]);
    assert_eq!(report["verified_pages"], (64 << 20) / 4096, "{report}");
    let blocks = |name: &str| report[name].as_u64().expect("a count");
    let (running, paused) = (blocks("blocks_hashed_running"), blocks("blocks_hashed_paused"));
    assert_eq!((&report["verify"], running + paused), (&"final".into(), 32), "{report}");
    assert!(running > paused, "{report}");
}

#[test]
fn nothing_is_compared_when_that_is_not_wanted() {
    let report = demo(&["--memory=16M", "--verify=off"]);
    assert_eq!(report["verified_pages"], 0);
    for blocks in ["blocks_hashed_running", "blocks_hashed_paused"] {
        assert_eq!(report[blocks], 0, "{report}");
    }
}

#[test]
fn without_json_the_summary_is_for_people() {
    let machine = format!("--machine={}", machine_word());
    let ended = Host::new().start(["demo", "--memory=16M", &machine, PATIENT]).wait().expect_code(0);
    for text in
        ["The guest moved, and kept running.", "downtime", "4096 pages at the switch, all equal", ", 0 wrong"]
    {
        assert!(ended.stdout.contains(text), "`{text}` is not in {}", ended.stdout);
    }
}

#[test]
fn a_demo_that_is_killed_takes_its_processes_along() {
    let host = Host::new();
    let demo = host.start(["demo", "--memory=16M", "--machine=synthetic", BUSY].iter().chain(&ENDLESS));
    demo.says("round 1:");
    let holders = children_of(demo.id());
    assert_eq!(holders.len(), 2, "a source and a destination");
    demo.signal(libc::SIGKILL);
    assert_eq!(demo.wait().signal, Some(libc::SIGKILL));
    wait_until("the demo's processes have ended", || holders.iter().all(|&id| parent_if_alive(id).is_none()));
}

/// The child processes of `parent`.
fn children_of(parent: i32) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").expect("there is a /proc").flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|&id| parent_if_alive(id) == Some(parent)).collect()
}

/// The parent of a process; `None` if the process is gone, or dead and not yet waited for.
fn parent_if_alive(id: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // After the name, which is in parentheses: the state, then the parent (proc_pid_stat(5)).
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next() == Some("Z") { None } else { fields.next()?.parse().ok() }
}

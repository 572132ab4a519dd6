//! Guests that write faster than the link carries, under each policy of the operator: each migration ends as
//! asked, with the guest where the exit code says. Also limits that change during a migration, and
//! predictions before any page is sent.
#![cfg(feature = "cli")]

mod common;

use serde_json::Value;

use common::{
    BUSY, ENDLESS, Ended, Host, Process, Receiving, go_between, machine_word, moves_away_from, runs_on,
};
use sterna::wire::{Message, SwitchCosts};
use sterna_vmm::{MachineConfig, RING_ENTRIES_MAX, Workload, new_kvm_with_rings};

/// Rounds that never get smaller: the guest writes all of its 2 MiB many times during the second in which
/// they are sent once, even with a small share of a busy processor.
const TOO_FAST: [&str; 3] = ["--machine=synthetic", "--working-set=2M", BUSY];
/// The options of its migration unless a test overrides them. The downtime is far less than a round takes,
/// and far more than a switch with nothing to send, even where a busy disk delays the records.
const SLOW_LINK: [&str; 3] = ["--transport=tcp", "--bandwidth-limit=2", "--downtime-limit=500"];

/// A guest that is too fast for the link of its migration.
struct UnderWay {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    migrating: Process,
}

impl UnderWay {
    fn new(how: &[&str]) -> Self {
        Self::of(&TOO_FAST, how)
    }

    fn of(guest: &[&str], how: &[&str]) -> Self {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", guest);
        let receiving = destination.receive(&[]);
        let of_option = |word: &str, given: &&str| word.split('=').next() == given.split('=').next();
        let mut all = SLOW_LINK.to_vec();
        all.retain(|word| !how.iter().any(|given| of_option(word, given)));
        all.extend(how);
        let migrating = source.migrate("tern", receiving.address, &all);
        Self { source, running, destination, receiving, migrating }
    }

    /// The migration has succeeded: the guest is at the destination, whole and at full speed, and not at the
    /// source.
    #[track_caller]
    fn moves(self) -> Ended {
        let ended = self.migrating.wait().expect_code(0);
        self.running.wait().expect_code(0);
        self.source.lets_go_of("tern");
        self.receiving.process.event("arrived");
        runs_on(&self.destination, "tern");
        self.destination.checks_clean("tern");
        ended
    }

    /// The migration has failed: the guest is at the source, whole and at full speed, and not at the
    /// destination.
    #[track_caller]
    fn stays(self, code: i32) -> Ended {
        let ended = self.migrating.wait().expect_code(code);
        let report = ended.json();
        assert_eq!(report["status"], "failed", "{report}");
        assert!(report["guest"].as_str().expect("it says where").contains("at the source"), "{report}");
        runs_on(&self.source, "tern");
        self.source.checks_clean("tern");
        self.destination.lets_go_of("tern");
        moves_away_from(&self.source, self.running, "tern", &["--verify=full"]);
        ended
    }
}

#[test]
fn stop_switches_whatever_the_downtime() {
    let ended = UnderWay::new(&["--if-stuck=stop", "--verify=full"]).moves();
    ended.says("switching all the same, with a downtime of about");
    let report = ended.json();
    assert_eq!(report["verified_pages"], (16 << 20) / 4096);
    assert!(report["predicted_downtime_ms"].as_f64() > Some(500.0), "{report}");
    assert!(report["downtime_measured"]["send_ms"].as_f64() > Some(500.0), "{report}");
}

#[test]
fn abort_gives_up_and_says_what_would_help() {
    let ended = UnderWay::new(&["--if-stuck=abort"]).stays(10);
    for text in ["error: given up after", "MB/s can be sent", "a downtime limit of", "MB/s at least"] {
        ended.says(text);
    }
}

#[test]
fn relax_allows_more_downtime_until_that_is_enough() {
    let ended = UnderWay::new(&["--if-stuck=relax,abort", "--downtime-max=9000"]).moves();
    ended.says("750 ms of downtime allowed").says("1125 ms of downtime allowed");
    let ended = UnderWay::new(&["--if-stuck=relax,abort", "--downtime-max=750"]).stays(10);
    ended.says("750 ms of downtime allowed").says("error: given up after");
}

/// The guest writes at a fixed rate, four times as fast as the link. So on any processor it is too fast for
/// the link at full speed, and slow enough at the last throttle step.
#[test]
fn throttle_slows_the_guest_until_its_rounds_get_smaller() {
    let guest = ["--machine=synthetic", "--working-set=2M", "--dirty-rate=8"];
    let report = UnderWay::of(&guest, &["--if-stuck=throttle"]).moves().json();
    let slowed: Vec<_> = report["per_round"]
        .as_array()
        .expect("the report has each round")
        .iter()
        .map(|round| {
            round["throttle_percent"].as_u64().expect("each round tells how far the guest was slowed")
        })
        .collect();
    assert_eq!(slowed[..3], [0; 3], "{slowed:?}");
    // A busy host may hide what a throttle does, and the throttle is taken back; but none is tried again that
    // is no larger.
    let slowed: Vec<_> = slowed.into_iter().filter(|&percent| percent > 0).collect();
    assert!(slowed.is_sorted() && !slowed.is_empty(), "{slowed:?}");
    let lost = &report["lost"];
    assert!(lost["throttling_ms"].as_f64() > Some(0.0), "{report}");
    let parts =
        ["downtime_ms", "throttling_ms", "tracking_ms"].map(|part| lost[part].as_f64().unwrap_or(0.0));
    let total = lost["total_ms"].as_f64().expect("the guest lost some time");
    assert!((parts.iter().sum::<f64>() - total).abs() < 0.01, "{lost}");
    assert!(report["predicted_downtime_ms"].as_f64() < Some(500.0), "{report}");
}

/// The first round takes half a minute, and the guest writes new pages all the while.
#[test]
fn a_guest_that_is_too_fast_is_acted_on_inside_its_first_round() {
    let guest = ["--machine=synthetic", "--memory=128M", "--working-set=64M", "--dirty-rate=8"];
    let ended = UnderWay::of(&guest, &["--if-stuck=abort"]).stays(10);
    ended.says("MB/s of new pages and").says("error: given up after 1 round");
    assert_eq!(ended.json()["per_round"], Value::Null, "{}", ended.json());

    let under_way = UnderWay::of(&guest, &["--if-stuck=throttle"]);
    under_way.migrating.says("guest slowed by");
    under_way.source.start(["migrate", "tern", "--set=throttle-max=5"]).wait().expect_code(0);
    under_way.migrating.says("guest slowed by 5 %");
    let slowed = &under_way.source.status("tern")["throttle_percent"];
    assert_eq!(slowed, 5);
    under_way.source.start(["cancel", "tern"]).wait().expect_code(0);
    let ended = under_way.stays(130);
    assert!(!ended.stderr.contains("round 2:"), "{}", ended.stderr);
}

/// One of two processors writes 8 MB/s over 16 MiB, more than the link carries; the other writes a single
/// page again and again.
const RINGS: [&str; 7] = [
    "--machine=kvm",
    "--dirty-log=ring",
    "--cpus=2",
    "--sweepers=1",
    "--memory=64M",
    "--working-set=16M",
    "--dirty-rate=16",
];

fn has_rings() -> bool {
    let config = MachineConfig {
        memory_bytes: 16 << 20,
        vcpus: 1,
        hugepages: None,
        workload: Workload::for_memory(16 << 20),
    };
    machine_word() == "kvm" && new_kvm_with_rings(config, RING_ENTRIES_MAX).is_ok()
}

#[test]
fn a_guest_with_dirty_rings_is_limited_in_what_it_writes_and_only_while_it_migrates() {
    if !has_rings() {
        println!("skipped: only a guest on KVM has dirty rings");
        return;
    }
    let slow = ["--bandwidth-limit=5", "--downtime-limit=1000", "--if-stuck=throttle"];
    let under_way = UnderWay::of(&RINGS, &slow);
    under_way.migrating.says("guest's writes limited to");
    let limit = &under_way.source.status("tern")["write_limit_pages_per_second"];
    assert!(limit.as_u64() > Some(0), "{limit}");
    under_way.source.start(["cancel", "tern"]).wait().expect_code(0);
    under_way.stays(130);

    let under_way = UnderWay::of(&RINGS, &slow);
    under_way.migrating.says("guest's writes limited to");
    let set = ["migrate", "tern", "--set=downtime-limit=60000"];
    under_way.source.start(set).wait().expect_code(0);
    let report = under_way.moves().json();
    let limited: Vec<_> = report["per_round"]
        .as_array()
        .expect("the report has each round")
        .iter()
        .filter_map(|round| Some((round["write_limit_mbps"].as_f64()?, round["throttle_percent"].as_u64()?)))
        .collect();
    assert!(!limited.is_empty() && limited.iter().all(|&(mbps, percent)| mbps > 0.0 && percent > 0));
    assert!(report["lost"]["throttling_ms"].as_f64() > Some(0.0), "{report}");
}

#[test]
fn a_chain_goes_on_where_its_first_policy_would_be_in_vain() {
    let ended = UnderWay::new(&["--if-stuck=throttle,stop", "--throttle-max=12"]).moves();
    ended.says("switching all the same");
}

#[test]
fn the_advice_of_a_migration_that_was_given_up_holds() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &TOO_FAST);
    let receiving = destination.receive(&[]);
    let strict = [&SLOW_LINK[..], &["--downtime-max=500", "--throttle-max=0"]].concat();
    let ended = source.migrate("tern", receiving.address, &strict).wait().expect_code(10);
    let error = ended.stderr.lines().find(|line| line.starts_with("error:")).expect("it says why");
    let advised = |before: &str| {
        let rest = error.split(before).nth(1).unwrap_or_else(|| panic!("{before} in {error}"));
        rest.split_whitespace().next().expect("a figure").to_owned()
    };
    let longer = format!("--downtime-limit={}", advised("a downtime limit of "));
    let how = ["--transport=tcp", SLOW_LINK[1], &longer, "--if-stuck=abort"];
    let report = source.migrate("tern", receiving.address, &how).wait().expect_code(0).json();
    assert!(report["rounds"].as_u64() < Some(20), "{report}");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// The guest would have to be paused for a second.
#[test]
fn by_default_the_guest_loses_least_within_the_limits_or_stays() {
    let ended = UnderWay::new(&["--downtime-max=9000"]).moves();
    ended.says("course: to allow").says("not taken: more rounds");
    let ended = UnderWay::new(&["--downtime-max=500", "--throttle-max=10"]).stays(10);
    ended.says("course: none is open").says("no more than 500 ms may be allowed").says("a downtime limit of");
    assert!(!ended.stderr.contains("guest slowed"), "{}", ended.stderr);
    let rounds = ended.stderr.lines().filter(|line| line.contains("  round ")).count();
    assert!(rounds < 20, "{}", ended.stderr);
    let ended = UnderWay::new(&["--downtime-max=9000", "--lost-max=600"]).stays(10);
    assert!(!ended.stderr.contains("guest slowed"), "{}", ended.stderr);
}

#[test]
fn it_is_said_that_it_will_not_converge_and_what_would_help_before_it_is_given_up() {
    let ended = UnderWay::new(&["--if-stuck=abort"]).stays(10);
    let line_of = |text: &str| ended.stderr.lines().position(|line| line.contains(text));
    let (second, warning, end) = (line_of("round 2:"), line_of("warning:"), line_of("error:"));
    assert!(second.is_some() && second < warning && warning < end, "{}", ended.stderr);
    ended.says("MB/s at least");
}

#[test]
fn a_limit_below_what_any_switch_takes_is_told_and_acted_on_after_two_rounds_and_no_guest_is_slowed_for_it() {
    for chain in ["--if-stuck=throttle", "--if-stuck=throttle,abort", "--if-stuck=relax"] {
        let ended = UnderWay::new(&["--downtime-limit=0", chain]).stays(10);
        ended.says("warning: a switch takes").says("even with nothing left to send");
        ended.says("error: given up after 2 rounds: a switch takes").says("a downtime limit of");
        assert!(!ended.stderr.contains("guest slowed"), "{}", ended.stderr);
    }
    let ended = UnderWay::new(&["--downtime-limit=0", "--if-stuck=throttle,stop"]).moves();
    assert_eq!(ended.json()["rounds"], 3, "two, and the last");
}

/// A destination that overstates the costs of its switch.
fn with_costs(change: fn(&mut SwitchCosts), how: &[&str], after: impl FnOnce(Process) -> Ended) {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--machine=synthetic", "--dirty-rate=0"]);
    let receiving = destination.receive(&[]);
    let between = go_between(receiving.address.ip(), receiving.address, move |message| {
        if let Message::Ready(_, costs) = message {
            assert!(costs.record_us > 0, "its journal is on a disk");
            assert!(costs.revoke_us > 0, "it has tried");
            change(costs);
        }
    });
    let migrating = source.migrate("tern", between, &[&["--transport=tcp"], how].concat());
    let report = after(migrating).expect_code(0).json();
    assert!(report["rounds"].as_u64() <= Some(3), "{report}");
    running.wait().expect_code(0);
    destination.checks_clean("tern");
}

#[test]
fn what_records_take_at_the_destination_is_part_of_what_is_predicted() {
    with_costs(
        |costs| costs.record_us = 70_000,
        &[],
        |migrating| {
            let ended = migrating.wait();
            for (part, record) in [("transfer_ms", "PREPARED"), ("start_ms", "RUNNING")] {
                let predicted = ended.json()["downtime_predicted"][part].as_f64();
                assert!(predicted > Some(70.0), "{record} has to be recorded: {ended:?}");
            }
            ended
        },
    );
}

#[test]
fn what_the_destination_measured_of_revoking_is_what_is_predicted_whatever_the_guests_size() {
    with_costs(
        |costs| costs.revoke_us = 123_000,
        &[],
        |migrating| {
            let ended = migrating.wait();
            assert_eq!(ended.json()["downtime_predicted"]["revoke_ms"], 123.0, "{ended:?}");
            ended
        },
    );
}

#[test]
fn an_idle_guest_moves_at_once_by_a_limit_that_was_relaxed_to_what_a_switch_costs() {
    let how = ["--if-stuck=relax", "--downtime-limit=100", "--downtime-max=5000"];
    with_costs(
        |costs| costs.revoke_us = 400_000,
        &how,
        |migrating| {
            let ended = migrating.wait();
            ended.says("warning: a switch takes").says("ms of downtime allowed");
            ended
        },
    );
}

#[test]
fn when_the_time_is_over_the_migration_is_given_up_or_ends_with_a_switch() {
    UnderWay::new(&["--timeout=1", "--if-stuck=throttle", "--throttle-max=0"]).stays(10);
    // In the middle of its first round, which takes two seconds.
    UnderWay::new(&["--timeout=1", "--bandwidth-limit=1", "--if-stuck=throttle"])
        .stays(10)
        .says("was to take 1 s");
    UnderWay::new(&["--timeout=1", "--if-stuck=throttle,stop", "--throttle-max=0"]).moves();
}

#[test]
fn after_the_last_round_allowed_it_is_given_up() {
    let ended = UnderWay::new(&["--max-rounds=2", "--if-stuck=throttle"]).stays(10);
    ended.says("error: given up after 2 rounds");
}

#[test]
fn limits_that_are_changed_on_the_way_take_effect_in_the_next_round() {
    let under_way = UnderWay::new(&["--if-stuck=throttle", "--throttle-max=0", "--max-rounds=10000"]);
    under_way.migrating.says("round 3:");
    let set = ["migrate", "tern", "--set=downtime-limit=5000", "--set", "bandwidth-limit=50", "--json"];
    let answer = under_way.source.start(set).wait().expect_code(0).json();
    assert_eq!(answer["limits"]["downtime_limit_ms"], 5000.0, "{answer}");
    assert_eq!(answer["limits"]["bandwidth_limit_mbps"], 50.0, "{answer}");
    let ended = under_way.moves();
    ended.says("limits changed: downtime-limit 5000 ms");
    let lines: Vec<_> = ended.stderr.lines().collect();
    let changed = lines.iter().position(|line| line.contains("limits changed")).expect("it was said");
    assert!(lines[changed + 1].contains("round "), "the round that was being sent ends: {lines:#?}");
    assert!(
        lines[changed + 2].contains("guest paused"),
        "and the next decision is by the new limit: {lines:#?}"
    );
}

#[test]
fn a_bandwidth_limit_that_is_lifted_is_felt_at_once() {
    let source = Host::new();
    let running = source.run("tern", &["--machine=synthetic", "--memory=512M", "--dirty-rate=0"]);
    let destination = Host::new();
    let receiving = destination.receive(&[]);
    // At this rate the first round would outlast the test's patience.
    let migrating = source.migrate("tern", receiving.address, &["--transport=tcp", "--bandwidth-limit=1"]);
    migrating.says("of RAM over TCP");
    source.start(["migrate", "tern", "--set", "bandwidth-limit=0"]).wait().expect_code(0);
    migrating.wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn nothing_can_be_set_where_nothing_moves_and_nothing_that_is_no_limit() {
    let host = Host::new();
    let _running = host.run("tern", &[]);
    let ended = host.start(["migrate", "tern", "--set=downtime-limit=50"]).wait().expect_code(10);
    ended.says("no migration of this guest is under way");
    for wrong in ["lanes=2", "throttle-max=100", "if-stuck=wait", "downtime-limit"] {
        host.start(["migrate", "tern", "--set", wrong]).wait().expect_code(2).says("--set takes LIMIT=VALUE");
    }
    host.start(["migrate", "tern"]).wait().expect_code(2);
    for wrong in ["--if-stuck=stop,abort", "--if-stuck=relax,relax", "--if-stuck="] {
        host.start(["migrate", "tern", "--to=127.0.0.1:1", wrong]).wait().expect_code(2);
    }
    runs_on(&host, "tern");
}

#[test]
fn whether_and_how_a_guest_would_move_is_known_before_anything_is_sent() {
    let host = Host::new();
    let idle = host.run("idle", &["--dirty-rate=0"]);
    let busy = host.run("busy", &["--working-set=8M", BUSY]);
    let how = ["--interval=200", "--bandwidth=10", "--bandwidth=100000", "--downtime-limit=300", "--json"];
    let sampled = |name: &str| {
        let ended = host.start(["dirty-rate", name].iter().chain(&how)).wait().expect_code(0);
        runs_on(&host, name);
        host.checks_clean(name);
        ended.json()
    };
    let said = sampled("idle");
    assert_eq!(said["forecasts"][0]["by_itself"], true, "{said}");
    assert_eq!(said["forecasts"][0]["rounds"], 2, "{said}");
    assert_eq!(said["sampled"]["samples"].as_array().map(Vec::len), Some(5), "{said}");

    let said = sampled("busy");
    assert_eq!(said["forecasts"][0]["by_itself"], false, "{said}");
    assert!(said["forecasts"][0]["help"].as_str().is_some_and(|help| help.contains("a link of")), "{said}");
    assert_eq!(said["forecasts"][1]["by_itself"], true, "{said}");
    // A guest that was sampled moves as before.
    moves_away_from(&host, idle, "idle", &["--verify=full"]);
    moves_away_from(&host, busy, "busy", &["--verify=full"]);
}

#[test]
fn a_guest_on_its_way_is_not_sampled() {
    let (source, destination) = (Host::new(), Host::new());
    let _running = source.run("tern", &TOO_FAST);
    let receiving = destination.receive(&[]);
    let migrating = source.migrate("tern", receiving.address, &ENDLESS);
    migrating.says("round 1:");
    source.start(["dirty-rate", "tern"]).wait().expect_code(11).says("is migrating to");
    migrating.signal(libc::SIGINT);
    migrating.wait().expect_code(130);
    runs_on(&source, "tern");
}

//! Migrations by RDMA, on a real device: soft-RoCE in the labs, otherwise an adapter.
//!
//! One test at a time, because the tests count the kernel's objects for the device.
#![cfg(feature = "cli")]

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::{
    BUSY, ENDLESS, Host, LONG, Process, Receiving, change_endpoints, change_keys, go_between, in_a_lab,
    machine_word, runs_on, wait_until,
};
use serde_json::Value;
use sterna::transport::rdma::RdmaPath;
use sterna::wire::Message;
use sterna_rdma::RemoteKey;

/// A device, for the time of a test.
struct Device {
    /// An address of this machine by which the device is reached.
    address: IpAddr,
    _alone: MutexGuard<'static, ()>,
}

/// The device; without one the test is skipped, in a lab it fails.
fn device_or_skip() -> Option<Device> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(address) = RdmaPath::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!(
            "skipped: no RDMA device on this machine. With one: `ci/lab uml cargo test --test rdma`, or make one with \
             `sterna soft-roce up`"
        );
        return None;
    };
    Some(Device { address, _alone: alone })
}

impl Device {
    fn receive(&self, host: &Host, more: &[&str]) -> Receiving {
        let listen = format!("--listen={}", self.address);
        host.receive(&[&[listen.as_str()], more].concat())
    }
}

#[track_caller]
fn demo(arguments: &[&str]) -> Value {
    let words = ["demo", "--json", "--transport=rdma"].iter().chain(arguments);
    let report = Host::new().start(words).wait().expect_code(0).json();
    assert_eq!(report["status"], "completed", "{report}");
    assert_eq!(report["transport"], "rdma", "{report}");
    assert_eq!(report["wrong_pages"], 0, "{report}");
    report
}

/// How many objects of each kind the kernel holds for RDMA devices.
fn kernel_objects() -> String {
    let output = Command::new("rdma").args(["resource", "show"]).output().expect("iproute2's `rdma` runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("plain text")
}

/// How much memory a process has pinned for devices; `None` once it has ended.
fn pinned_kib_if_alive(process: &Process) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).ok()?;
    // A process that has ended and is not yet waited for has no memory.
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"))?;
    Some(line.trim().trim_end_matches(" kB").parse().expect("a number"))
}

fn pinned_kib(process: &Process) -> u64 {
    pinned_kib_if_alive(process).expect("it lives")
}

/// The kernel frees some objects a little after their process has ended.
#[track_caller]
fn objects_come_down_to(before: &str) {
    wait_until(&format!("the kernel holds no more than {before}"), || kernel_objects() == before);
}

#[test]
fn a_guest_moves_by_rdma() {
    let Some(_device) = device_or_skip() else { return };
    let report = demo(&["--memory=32M", "--machine", machine_word()]);
    assert_eq!(report["verified_pages"], (32 << 20) / 4096);
    assert_eq!(report["machine"], machine_word());
    assert!(report["rounds"].as_u64() > Some(1), "{report}");
}

#[test]
fn rdma_is_taken_by_itself_where_a_device_reaches_the_peer() {
    let Some(_device) = device_or_skip() else { return };
    let ended = Host::new()
        .start(["demo", "--json", "--memory=16M", "--machine", machine_word()])
        .wait()
        .expect_code(0);
    assert_eq!(ended.json()["transport"], "rdma");
    ended.says("an RDMA device has the address that reaches the peer");
}

#[test]
fn pages_that_are_written_again_and_again_arrive_in_their_latest_state_over_any_number_of_lanes() {
    let Some(_device) = device_or_skip() else { return };
    let guest = ["--machine=synthetic", "--memory=32M", "--cpus=4", "--working-set=8M", BUSY];
    // The working set would take 160 ms to send, and a throttled guest is still too fast for a while. Where
    // guest and both ends share one slow processor, round trips alone can exceed the limit; throttling cannot
    // help then, so the migration stops the guest.
    let limits = ["--downtime-limit=60", "--bandwidth-limit=50", "--if-stuck=throttle,stop"];
    for lanes in ["--lanes=1", "--lanes=2", "--lanes=4", "--lanes=8"] {
        let report = demo(&[&guest[..], &limits, &[lanes]].concat());
        assert_eq!(report["verified_pages"], (32 << 20) / 4096);
        assert!(report["rounds"].as_u64() > Some(2), "{report}");
    }
}

#[test]
fn where_next_to_nothing_may_be_locked_that_is_told_and_tcp_does_without() {
    let Some(device) = device_or_skip() else { return };
    let limited = || Host::that_may_lock(2 << 20);
    // The memory for queues is subtracted from the limit: more at the source, which has more requests in
    // flight.
    for (source, destination, lockable) in
        [(limited(), Host::new(), "may lock 1.7 MiB"), (Host::new(), limited(), "may lock 2.0 MiB")]
    {
        let running = source.run("tern", &["--memory=32M"]);
        let receiving = device.receive(&destination, &[]);
        let only_rdma = ["--transport=rdma", "--lanes=1"];
        let by_rdma = source.migrate("tern", receiving.address, &only_rdma).wait().expect_code(11);
        by_rdma
            .says("RDMA needs 4 MiB of locked memory to be of use here")
            .says(lockable)
            .says("ulimit -l unlimited");
        runs_on(&source, "tern");

        let by_any = source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
        by_any.says("no RDMA:").says("of locked memory");
        assert_eq!(by_any.json()["transport"], "tcp");
        running.wait().expect_code(0);
        runs_on(&destination, "tern");
        destination.checks_clean("tern");
    }
}

#[test]
fn a_guest_larger_than_the_limit_on_locked_memory_moves_by_rdma_a_part_at_a_time() {
    let Some(device) = device_or_skip() else { return };
    let limited = || Host::that_may_lock(16 << 20);
    let lanes = ["--transport=rdma", "--verify=full", "--downtime-limit=2000"];
    for (source, destination, lanes_count, budget) in [
        (limited(), Host::new(), "--lanes=1", "at most 15 MiB pinned"),
        (Host::new(), limited(), "--lanes=2", "at most 15 MiB pinned"),
        (limited(), limited(), "--lanes=8", "at most 13 MiB pinned"),
    ] {
        let running = source.run("tern", &["--memory=64M", "--cpus=2", BUSY]);
        let receiving = device.receive(&destination, &[]);
        let arguments = [&lanes[..], &[lanes_count]].concat();
        let ended = source.migrate("tern", receiving.address, &arguments).wait().expect_code(0);
        ended.says(budget);
        assert_eq!(ended.json()["verified_pages"], (64 << 20) / 4096);
        running.wait().expect_code(0);
        runs_on(&destination, "tern");
        destination.checks_clean("tern");
    }
}

#[test]
fn either_end_may_be_told_to_pin_less() {
    let Some(device) = device_or_skip() else { return };
    for (here, there) in [(&["--pin-limit=8M"][..], &[][..]), (&[], &["--pin-limit=8M"])] {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &["--memory=64M"]);
        let receiving = device.receive(&destination, there);
        // Slow enough to sample the pinned memory many times.
        let slowly = ["--transport=rdma", "--verify=full", "--lanes=2", "--bandwidth-limit=50"];
        let mut migrating = source.migrate("tern", receiving.address, &[&slowly[..], here].concat());
        let mut most_kib = [0; 2];
        while !migrating.has_ended() {
            for (most, process) in most_kib.iter_mut().zip([&running, &receiving.process]) {
                *most = pinned_kib_if_alive(process).map_or(*most, |pinned| pinned.max(*most));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        migrating.wait().expect_code(0).says("at most 8 MiB pinned");
        // A device may pin its queues too.
        assert!(most_kib.iter().all(|kib| (4 << 10..=9 << 10).contains(kib)), "{most_kib:?}");
        running.wait().expect_code(0);
        destination.checks_clean("tern");
    }
}

/// Moves a guest of 64 MiB that writes to this working set; returns the predicted and the measured time of
/// the downtime spent waiting for registration.
fn registration_while_paused(device: &Device, working_set: &str, pin_limit: &str) -> (f64, f64) {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--memory=64M", working_set, BUSY]);
    let receiving = device.receive(&destination, &[]);
    // Rounds so long that the guest writes its whole working set in each; after some rounds any predicted
    // downtime is allowed.
    let rounds = ["--bandwidth-limit=30", "--downtime-limit=0", "--max-rounds=4", "--if-stuck=stop"];
    let lanes = ["--transport=rdma", "--lanes=2", "--verify=full", "--throttle-max=0", pin_limit];
    let arguments = [&lanes[..], &rounds].concat();
    let ended = source.migrate("tern", receiving.address, &arguments).wait().expect_code(0);
    let report = ended.json();
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
    let [predicted, measured] =
        ["downtime_predicted", "downtime_measured"].map(|of| report[of]["register_ms"].as_f64());
    println!("{working_set} {pin_limit}: {} {}", report["downtime_predicted"], report["downtime_measured"]);
    (predicted.expect("it is predicted"), measured.expect("it is measured"))
}

#[test]
fn what_a_guest_is_busy_with_is_registered_when_it_is_paused_or_the_wait_for_it_is_expected() {
    let Some(device) = device_or_skip() else { return };
    let fits = registration_while_paused(&device, "--working-set=8M", "--pin-limit=32M");
    assert_eq!(fits, (0.0, 0.0));
    let (expected, measured) = registration_while_paused(&device, "--working-set=48M", "--pin-limit=16M");
    assert!(expected > 0.0 && measured > 0.0, "expected {expected} ms, took {measured} ms");
}

/// All lanes but one wait for the only chunk that the limit allows.
#[test]
fn lanes_that_wait_for_one_anothers_slice_can_be_cancelled() {
    let Some(device) = device_or_skip() else { return };
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--memory=64M", BUSY]);
    let receiving = device.receive(&destination, &[]);
    let lanes = ["--transport=rdma", "--lanes=4", "--pin-limit=4M"];
    for first_round in [true, false] {
        let before = kernel_objects();
        let endless: &[&str] = if first_round { &LONG } else { &ENDLESS };
        let migrating = source.migrate("tern", receiving.address, &[&lanes, endless].concat());
        migrating.says("at most 4 MiB pinned");
        if first_round {
            wait_until("a slice is pinned", || pinned_kib(&running) > 0);
        } else {
            migrating.says("round 2:");
        }
        migrating.signal(libc::SIGINT);
        migrating.wait().expect_code(130);
        runs_on(&source, "tern");
        objects_come_down_to(&before);
        assert_eq!((pinned_kib(&running), pinned_kib(&receiving.process)), (0, 0));
    }
    let fast = [&lanes[..], &["--verify=full", "--downtime-limit=5000"]].concat();
    source.migrate("tern", receiving.address, &fast).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// The first chunk arrives; the destination's device refuses the writes into the second.
#[test]
fn a_key_that_is_not_valid_ends_the_attempt_part_way_and_the_guest_can_move_again() {
    let Some(device) = device_or_skip() else { return };
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--memory=96M"]);
    let receiving = device.receive(&destination, &[]);
    let mut keys_seen = 0;
    let between = go_between(device.address, receiving.address, move |message| {
        change_keys(message, |key| {
            keys_seen += 1;
            if keys_seen == 2 {
                key.key = RemoteKey::from_raw(!key.key.to_raw());
            }
        });
    });
    let cut = source.migrate("tern", between, &["--transport=rdma"]).wait().expect_code(10);
    cut.says("an RDMA write failed on lane").says("where: the guest runs on at the source");
    runs_on(&source, "tern");

    // After its own message the destination has given the attempt up, and listens again.
    let ended = source
        .migrate("tern", receiving.address, &["--transport=rdma", "--verify=full"])
        .wait()
        .expect_code(0);
    assert_eq!(ended.json()["transport"], "rdma");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// Asserts that a migration falls back to TCP for this reason, within one attempt of the destination, and
/// that a migration for which RDMA was asked by name fails instead. `change` alters the destination's
/// messages.
#[track_caller]
fn falls_back_to_tcp(
    device: &Device,
    guest: &[&str],
    why: &str,
    change: impl FnMut(&mut Message) + Clone + Send + 'static,
) {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", guest);
    let receiving = device.receive(&destination, &[]);
    let between = go_between(device.address, receiving.address, change.clone());
    let by_name = source.migrate("tern", between, &["--transport=rdma"]).wait();
    // Before the first page it counts as refused.
    assert!(matches!(by_name.code, Some(10 | 11)), "{by_name:#?}");
    by_name.says(why);
    runs_on(&source, "tern");
    drop(receiving);

    let receiving = device.receive(&destination, &["--once"]);
    let between = go_between(device.address, receiving.address, change);
    let ended = source.migrate("tern", between, &["--verify=full"]).wait().expect_code(0);
    ended.says("RDMA failed, going on over TCP: ").says(why);
    let report = ended.json();
    assert_eq!(report["transport"], "tcp", "{report}");
    assert!(report["fell_back"].as_str().is_some_and(|text| text.contains(why)), "{report}");
    assert!(report["verified_pages"].as_u64() > Some(0), "{report}");
    // Everything is dirty again, except for zero pages.
    let first_round = &report["per_round"][0]["pages"];
    assert_eq!(first_round.as_u64().zip(report["pages_zero"].as_u64()).map(|(sent, zero)| sent + zero), {
        report["verified_pages"].as_u64()
    });
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

#[test]
fn queue_pairs_that_do_not_connect_make_way_for_tcp() {
    let Some(device) = device_or_skip() else { return };
    falls_back_to_tcp(&device, &["--memory=16M"], "ibv_modify_qp failed", |message| {
        // An address of the block for documentation, to which no host has a route.
        let nowhere = Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets();
        change_endpoints(message, |endpoint| endpoint.gid = nowhere);
    });
}

/// Writes get no answer: the peer has no such queue pair.
#[test]
fn an_rdma_network_that_fails_while_the_guest_runs_makes_way_for_tcp() {
    let Some(device) = device_or_skip() else { return };
    falls_back_to_tcp(
        &device,
        &["--memory=32M", BUSY],
        "no answer from the peer after all retries",
        |message| change_endpoints(message, |endpoint| endpoint.queue_pair_number ^= 0x00ff_0000),
    );
}

#[test]
fn access_that_was_refused_never_makes_way_for_tcp() {
    let Some(device) = device_or_skip() else { return };
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--memory=16M"]);
    let receiving = device.receive(&destination, &[]);
    let between = go_between(device.address, receiving.address, move |message| {
        change_keys(message, |key| key.key = RemoteKey::from_raw(!key.key.to_raw()));
    });
    let refused = source.migrate("tern", between, &[]).wait().expect_code(10);
    refused.says("the peer refused access").says("where: the guest runs on at the source");
    assert!(!refused.stderr.contains("over TCP"), "{}", refused.stderr);
    runs_on(&source, "tern");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    destination.checks_clean("tern");
}

/// From the second round on, each round has to pin more than this end may lock.
#[test]
fn an_end_that_can_register_no_more_in_the_middle_makes_way_for_tcp() {
    let Some(device) = device_or_skip() else { return };
    let limited = || Host::that_may_lock(80 << 20);
    for (source, destination, limited_there) in
        [(limited(), Host::new(), false), (Host::new(), limited(), true)]
    {
        let running = source.run("tern", &["--memory=96M", "--working-set=90M", BUSY]);
        let receiving = device.receive(&destination, &["--once"]);
        let mut arguments = vec!["--verify=full", "--lanes=1", "--pin-limit=64M", "--bandwidth-limit=20"];
        arguments.extend(&ENDLESS[..4]);
        let migrating = source.migrate("tern", receiving.address, &arguments);
        migrating.says("over RDMA");
        migrating.says("round 2:");
        if limited_there { &receiving.process } else { &running }.may_lock_no_more();
        migrating.says("RDMA failed, going on over TCP: ");
        migrating.says("over TCP: 1 TCP stream");
        source.start(["migrate", "tern", "--set", "downtime-limit=60000"]).wait().expect_code(0);
        let ended = migrating.wait().expect_code(0);
        let report = ended.json();
        assert_eq!(report["transport"], "tcp", "{report}");
        assert_eq!(report["verified_pages"], (96 << 20) / 4096);
        let why = report["fell_back"].as_str().expect("it says why");
        assert!(why.contains("cannot pin") && why.contains("ulimit -l"), "{why}");
        assert_eq!(why.contains("at the other side"), limited_there, "{why}");
        running.wait().expect_code(0);
        runs_on(&destination, "tern");
        destination.checks_clean("tern");
    }
}

#[test]
fn fifty_migrations_in_a_row_leave_nothing_behind() {
    let Some(device) = device_or_skip() else { return };
    let before = kernel_objects();
    let mut host = Host::new();
    let mut holder: Process = host.run("tern", &[]);
    for _ in 0..50 {
        let next = Host::new();
        let receiving = device.receive(&next, &[]);
        let ended = host.migrate("tern", receiving.address, &["--transport=rdma"]).wait().expect_code(0);
        assert_eq!(ended.json()["transport"], "rdma");
        holder.wait().expect_code(0);
        // The process that now holds the guest lives on.
        objects_come_down_to(&before);
        assert_eq!(pinned_kib(&receiving.process), 0);
        (host, holder) = (next, receiving.process);
    }
    runs_on(&host, "tern");
    host.checks_clean("tern");
}

#[test]
fn fifty_migrations_that_are_cancelled_leave_nothing_behind() {
    let Some(device) = device_or_skip() else { return };
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = device.receive(&destination, &[]);
    let before = kernel_objects();
    let open_files = |process: &Process| {
        std::fs::read_dir(format!("/proc/{}/fd", process.id())).expect("it lives").count()
    };
    let mut files_before = None;
    for _ in 0..50 {
        let migrating =
            source.migrate("tern", receiving.address, &[&["--transport=rdma"], &ENDLESS[..]].concat());
        migrating.says("round 1:");
        assert_ne!(kernel_objects(), before, "the kernel counts what is made");
        assert_ne!(pinned_kib(&running), 0, "the kernel counts what is pinned");
        migrating.signal(libc::SIGINT);
        migrating.wait().expect_code(130);
        runs_on(&source, "tern");
        // Both processes live on.
        objects_come_down_to(&before);
        assert_eq!((pinned_kib(&running), pinned_kib(&receiving.process)), (0, 0));
        let files = || [open_files(&running), open_files(&receiving.process)];
        // The first attempt opens descriptors that stay open, such as the library's; both ends may still be
        // closing others.
        let most = *files_before.get_or_insert_with(|| {
            std::thread::sleep(Duration::from_secs(2));
            files()
        });
        wait_until("no descriptor is left open", || files().iter().zip(most).all(|(&now, most)| now <= most));
    }
    let ended = source
        .migrate("tern", receiving.address, &["--transport=rdma", "--verify=full"])
        .wait()
        .expect_code(0);
    assert_eq!(ended.json()["transport"], "rdma");
    running.wait().expect_code(0);
    destination.checks_clean("tern");
}

#[test]
fn when_the_destination_is_killed_the_guest_runs_on_and_can_move_by_rdma_again() {
    let Some(device) = device_or_skip() else { return };
    let source = Host::new();
    let running = source.run("tern", &[BUSY]);
    let lost = Host::new();
    let killed = device.receive(&lost, &[]);
    let migrating = source.migrate("tern", killed.address, &[&["--transport=rdma"], &ENDLESS[..]].concat());
    migrating.says("round 1:");
    killed.process.signal(libc::SIGKILL);
    migrating.wait().expect_code(10).says("where: the guest");
    runs_on(&source, "tern");

    let destination = Host::new();
    let receiving = device.receive(&destination, &[]);
    source.migrate("tern", receiving.address, &["--transport=rdma", "--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// The process is stopped, but its memory can still be written to.
#[test]
fn when_the_destination_hangs_the_source_gives_up_and_the_guest_runs_on() {
    let Some(device) = device_or_skip() else { return };
    let source = Host::new();
    let running = source.run("tern", &[BUSY]);
    let silent = Host::new();
    let stopped = device.receive(&silent, &[]);
    let migrating = source.migrate("tern", stopped.address, &[&["--transport=rdma"], &LONG[..]].concat());
    migrating.says("round 1:");
    stopped.process.signal(libc::SIGSTOP);
    migrating.wait().expect_code(10).says("nothing was heard from the other side");
    runs_on(&source, "tern");
    drop(running);
}

#[test]
fn when_the_source_is_killed_the_destination_does_not_run_the_guest() {
    let Some(device) = device_or_skip() else { return };
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = device.receive(&destination, &["--once"]);
    let migrating =
        source.migrate("tern", receiving.address, &[&["--transport=rdma"], &ENDLESS[..]].concat());
    migrating.says("round 1:");
    running.signal(libc::SIGKILL);
    receiving.process.wait().expect_code(10);
    destination.lets_go_of("tern");
    migrating.wait().expect_code(12);
}

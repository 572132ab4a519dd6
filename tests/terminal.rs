//! Output without a reader and terminals that hang up: neither ends a process that holds a guest, and no exit
//! code changes.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{BUSY, ENDLESS, Fate, Host, Process, Receiving, moves_away_from, relay, runs_on, wait_until};
use sterna::wire::Message;

/// Ways to run a command, as a shell's `"$@"`, with output that fails; the exit code is that of the command.
const DEAF: [&str; 4] = [
    r#""$@" 2>&1 | head -n 1; exit "${PIPESTATUS[0]}""#,
    r#"exec "$@" > /dev/full 2> /dev/full"#,
    r#"exec "$@" <&- >&- 2>&-"#,
    r#""$@" 2>&1 | true; exit "${PIPESTATUS[0]}""#,
];

/// A full pipe with a reader that lives and never reads, like a terminal stopped by Ctrl-S.
const FULL: &str = r#"exec > >(exec tail -f /dev/null --pid=$$ > /dev/null 2>&1) 2>&1
                      head -c 65536 /dev/zero; exec "$@""#;

/// The migration switches however loaded the machine is.
const SWITCHES: &str = "--downtime-limit=600000";

/// A host that runs all its processes in this way.
fn deaf(how: &str) -> Host {
    Host::under(&["bash", "-c", how, "bash"])
}

/// `sterna receive`, up to the moment when it listens, which it cannot report.
fn receive(host: &Host) -> (Process, SocketAddr) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = free.local_addr().expect("it is bound");
    drop(free);
    let process = host.start(["receive".to_owned(), "--json".into(), format!("--port={}", address.port())]);
    wait_until("it listens", || TcpStream::connect(address).is_ok());
    (process, address)
}

#[test]
fn a_guest_that_arrives_where_nobody_reads_is_held_and_moves_on() {
    for how in DEAF.into_iter().chain([FULL]) {
        let (source, destination, third) = (Host::new(), deaf(how), Host::new());
        let running = source.run("tern", &[]);
        let (receiving, address) = receive(&destination);
        source.migrate("tern", address, &[SWITCHES]).wait().expect_code(0);
        running.wait().expect_code(0);
        wait_until("the guest is held", || destination.phase("tern").as_deref() == Some("running"));
        runs_on(&destination, "tern");
        destination.checks_clean("tern");

        let next = third.receive(&[]);
        let to = next.address.to_string();
        // A command that shows progress may wait for its reader.
        let asking = if how == FULL { Host::new() } else { deaf(how) };
        let migrating = asking.start_at(&destination, ["migrate", "tern", "--to", &to, "--json", SWITCHES]);
        migrating.wait().expect_code(0);
        receiving.wait().expect_code(0);
        runs_on(&third, "tern");
    }
}

#[test]
fn exit_codes_do_not_depend_on_who_reads() {
    let guest = Host::new();
    let _running = guest.run("tern", &[]);
    let check = guest.start(["check"]).wait().code.expect("it ends by itself");
    for (words, code) in [
        (&["--help"][..], 0),
        (&["migrate", "--help"], 0),
        (&["frobnicate"], 2),
        (&["check", "--json"], check),
        (&["recover", "tern", "--json"], 0),
        (&["recover", "nobody"], 11),
        (&["dirty-rate", "tern", "--interval=16"], 0),
        (&["migrate", "nobody", "--to=127.0.0.1:1"], 11),
        (&["cancel", "tern"], 10),
    ] {
        for how in DEAF {
            let ended = deaf(how).start_at(&guest, words).wait();
            assert_eq!(ended.code, Some(code), "{words:?} by {how}: {ended:#?}");
        }
    }
}

/// A running migration that lasts until a test ends it.
struct UnderWay {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    to: String,
    migrating: Process,
}

impl UnderWay {
    fn new(guest: &[&str]) -> Self {
        let source = Host::new();
        let running = source.run("tern", guest);
        let destination = Host::new();
        let receiving = destination.receive(&[]);
        let migrating = source.migrate("tern", receiving.address, &ENDLESS);
        migrating.says("round 2:");
        let to = receiving.address.to_string();
        Self { source, running, destination, receiving, to, migrating }
    }

    fn watch(&self) -> Process {
        let watching = self.source.start(["migrate", "tern", "--watch", "--json"]);
        watching.says("  round ");
        watching
    }

    fn is_under_way(&self) {
        assert_eq!(self.source.status("tern")["migrating"], true);
    }

    fn cancel(&self) {
        self.source.start(["cancel", "tern"]).wait().expect_code(0);
    }
}

#[test]
fn a_migration_whose_command_is_gone_can_be_watched_and_cancelled() {
    for signal in [libc::SIGHUP, libc::SIGKILL] {
        let under_way = UnderWay::new(&[BUSY]);
        under_way.migrating.signal(signal);
        wait_until("the command is gone", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", under_way.migrating.id())).unwrap();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z"))
        });
        under_way.is_under_way();

        // A second migration is refused, with a remedy.
        let again = under_way.source.migrate("tern", "127.0.0.1:1", &[]).wait().expect_code(11);
        let goes = format!("tern is migrating to {} already", under_way.to);
        again.says(&goes).says("`sterna migrate tern --watch`").says("`sterna cancel tern`");
        assert_eq!(again.json()["exit"], "refused");

        // A watcher that leaves cancels nothing.
        let leaving = under_way.watch();
        leaving.signal(libc::SIGINT);
        assert_eq!(leaving.wait().signal, Some(libc::SIGINT));
        under_way.is_under_way();

        let watching = under_way.watch();
        under_way.cancel();
        assert_eq!(watching.wait().expect_code(130).json()["exit"], "cancelled");
        let UnderWay { source, running, migrating, .. } = under_way;
        assert_eq!(migrating.wait().signal, Some(signal));
        runs_on(&source, "tern");
        let none = source.start(["migrate", "tern", "--watch"]).wait().expect_code(10);
        none.says("no migration of this guest is under way");
        moves_away_from(&source, running, "tern", &[SWITCHES]);
    }
}

#[test]
fn all_who_watch_a_migration_read_the_same_report() {
    let under_way = UnderWay::new(&[BUSY]);
    let watching = [under_way.watch(), under_way.watch()];
    under_way.source.start(["migrate", "tern", &format!("--set={}", &SWITCHES[2..])]).wait().expect_code(0);
    let report = under_way.migrating.wait().expect_code(0).json();
    assert_eq!(report["status"], "completed");
    for watching in watching {
        assert_eq!(watching.wait().expect_code(0).json(), report);
    }
    under_way.running.wait().expect_code(0);
}

#[test]
fn a_client_that_does_not_read_holds_nothing_up_and_gets_the_end() {
    let under_way = UnderWay::new(&[BUSY]);
    let watching = under_way.watch();
    under_way.migrating.signal(libc::SIGSTOP);
    let round = |line: &str| line.strip_prefix("  round ")?.split_once(':')?.0.parse::<u32>().ok();
    watching.says_a_line("of a late round", |line| round(line) >= Some(4));
    under_way.cancel();
    watching.wait().expect_code(130);
    runs_on(&under_way.source, "tern");

    under_way.migrating.signal(libc::SIGCONT);
    under_way.migrating.wait().expect_code(130);
    moves_away_from(&under_way.source, under_way.running, "tern", &[SWITCHES]);
}

/// Asserts that a guest of this host is alive and can be moved away.
#[track_caller]
fn goes_on(host: &Host, process: Process) {
    runs_on(host, "tern");
    host.checks_clean("tern");
    moves_away_from(host, process, "tern", &[SWITCHES]);
}

#[test]
fn a_guest_survives_its_terminal() {
    let host = Host::new();
    let running = host.run("tern", &[]);
    running.signal(libc::SIGHUP);
    running.says("SIGHUP");
    goes_on(&host, running);
}

#[test]
fn a_guest_survives_a_terminal_that_is_really_gone() {
    let in_a_terminal = r#"exec script -qfec "$(printf '%q ' "$@")" /dev/null"#;
    let host = Host::under(&["bash", "-c", in_a_terminal, "bash"]);
    let running = host.run("tern", &[]);
    // Kills the process at the terminal's other end: the kernel hangs up.
    running.signal(libc::SIGKILL);
    running.wait();
    let (second, destination) = (Host::new(), Host::new());
    let receiving = destination.receive(&[]);
    let to = receiving.address.to_string();
    runs_on(&host, "tern");
    second.start_at(&host, ["migrate", "tern", "--to", &to, SWITCHES]).wait().expect_code(0);
    host.lets_go_of("tern");
    runs_on(&destination, "tern");
}

#[test]
fn a_guest_arrives_whose_receivers_terminal_hangs_up() {
    let under_way = UnderWay::new(&[BUSY]);
    let UnderWay { source, running, destination, receiving, migrating, .. } = under_way;
    receiving.process.signal(libc::SIGHUP);
    source.start(["migrate", "tern", &format!("--set={}", &SWITCHES[2..])]).wait().expect_code(0);
    migrating.wait().expect_code(0);
    running.wait().expect_code(0);
    receiving.process.event("arrived");
    runs_on(&destination, "tern");
    receiving.process.signal(libc::SIGHUP);
    receiving.process.says("SIGHUP");
    goes_on(&destination, receiving.process);
}

#[test]
fn a_receiver_without_a_guest_ends_with_its_terminal_and_leaves_no_socket() {
    let host = Host::new();
    let receiving = host.receive(&[]);
    receiving.process.signal(libc::SIGHUP);
    assert_eq!(receiving.process.wait().signal, Some(libc::SIGHUP));

    // The same when the expected guest does not arrive.
    let under_way = UnderWay::new(&[BUSY]);
    let process = &under_way.receiving.process;
    process.signal(libc::SIGHUP);
    under_way.cancel();
    let UnderWay { source, running, destination, receiving, migrating, .. } = under_way;
    migrating.wait().expect_code(130);
    let ended = receiving.process.wait();
    assert_eq!(ended.signal, Some(libc::SIGHUP), "{ended:#?}");
    assert!(!destination.socket("tern").exists());
    goes_on(&source, running);
}

#[test]
fn a_receiver_that_is_told_to_end_leaves_the_guest_at_its_source() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let UnderWay { source, running, destination, receiving, migrating, .. } = UnderWay::new(&[BUSY]);
        receiving.process.signal(signal);
        let ended = receiving.process.wait();
        assert_eq!(ended.signal, Some(signal), "{ended:#?}");
        ended.says("the guest stays at its source");
        assert!(!destination.socket("tern").exists());
        migrating.wait().expect_code(10);
        goes_on(&source, running);
    }
}

#[test]
fn a_guest_ends_with_the_process_that_is_told_to_end() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let host = Host::new();
        let running = host.run("tern", &[]);
        running.signal(signal);
        running.event("stopped");
        running.wait().expect_code(0).says("tern ends, and this process ends");
        assert!(!host.socket("tern").exists());
    }
}

#[test]
fn a_migration_is_finished_before_its_process_ends() {
    let under_way = UnderWay::new(&[BUSY]);
    under_way.running.signal(libc::SIGTERM);
    under_way.running.says(&format!("tern is migrating to {} already", under_way.to));
    under_way.is_under_way();
    let UnderWay { source, running, destination, migrating, receiving: _receiving, .. } = under_way;
    source.start(["migrate", "tern", &format!("--set={}", &SWITCHES[2..])]).wait().expect_code(0);
    migrating.wait().expect_code(0);
    running.event("moved");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");

    // When the migration fails, the process then ends the guest.
    let under_way = UnderWay::new(&[BUSY]);
    under_way.running.signal(libc::SIGTERM);
    under_way.running.says("After that tern, if it is here, ");
    // The process may end before the command sees the cancellation through.
    let cancelling = under_way.source.start(["cancel", "tern"]).wait();
    assert!(matches!(cancelling.code, Some(0 | 10)), "{cancelling:#?}");
    let UnderWay { source, running, migrating, .. } = under_way;
    migrating.wait().expect_code(130);
    running.event("stopped");
    running.wait().expect_code(0);
    assert!(!source.socket("tern").exists());
}

/// The source is in doubt, and the destination has loaded the guest and waits: GO is lost, and so are
/// the source's questions until `open` is set.
struct InDoubt {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    open: Arc<AtomicBool>,
}

impl InDoubt {
    fn new() -> Self {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &[]);
        let receiving = destination.receive(&[]);
        let open = Arc::new(AtomicBool::new(false));
        let opened = open.clone();
        let via = relay(receiving.address, move |_, _, message| match message {
            Message::Go(_) | Message::Ask(_) if !opened.load(Ordering::Relaxed) => Fate::Cut,
            _ => Fate::Pass,
        });
        source.migrate("tern", via, &["--transport=tcp", SWITCHES]).wait().expect_code(12);
        Self { source, running, destination, receiving, open }
    }
}

#[test]
fn a_guest_in_doubt_is_not_ended_before_that_is_settled() {
    let InDoubt { source, running, destination, receiving: _receiving, open } = InDoubt::new();
    running.signal(libc::SIGTERM);
    running.says("SIGTERM: an earlier migration of this guest is in doubt");
    assert_eq!(source.status("tern")["in_doubt"], true);
    open.store(true, Ordering::Relaxed);
    running.event("moved");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn a_guest_that_is_loaded_is_run_by_a_receiver_that_was_told_to_end() {
    let InDoubt { source: _source, running, destination, receiving, open } = InDoubt::new();
    receiving.process.signal(libc::SIGTERM);
    receiving.process.says("the guest is loaded and may have to run here");
    open.store(true, Ordering::Relaxed);
    running.event("moved");
    receiving.process.says("another SIGTERM ends this process");
    runs_on(&destination, "tern");
    receiving.process.signal(libc::SIGTERM);
    receiving.process.wait().expect_code(0);
    assert!(!destination.socket("tern").exists());
}

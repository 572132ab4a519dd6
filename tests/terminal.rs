//! Output that nobody reads and terminals that hang up: neither ends a process that holds a guest, and no exit code changes.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};

use common::{BUSY, ENDLESS, Host, Process, Receiving, moves_away_from, runs_on, wait_until};

/// Ways to run a command, as a shell's `"$@"`, with output that fails; the exit code is that of the command.
const DEAF: [&str; 4] = [
    r#""$@" 2>&1 | head -n 1; exit "${PIPESTATUS[0]}""#,
    r#"exec "$@" > /dev/full 2> /dev/full"#,
    r#"exec "$@" <&- >&- 2>&-"#,
    r#""$@" 2>&1 | true; exit "${PIPESTATUS[0]}""#,
];

/// A pipe that is full, whose reader lives and never reads: as a terminal that was stopped by Ctrl-S.
const FULL: &str = r#"exec > >(exec tail -f /dev/null --pid=$$ > /dev/null 2>&1) 2>&1
                      head -c 65536 /dev/zero; exec "$@""#;

/// A host whose processes all run in such a way.
fn deaf(how: &str) -> Host {
    Host::under(&["bash", "-c", how, "bash"])
}

/// `sterna receive`, up to the moment when it listens, which it cannot say.
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
        source.migrate("tern", address, &[]).wait().expect_code(0);
        running.wait().expect_code(0);
        wait_until("the guest is held", || destination.phase("tern").as_deref() == Some("running"));
        runs_on(&destination, "tern");
        destination.checks_clean("tern");

        let next = third.receive(&[]);
        let to = next.address.to_string();
        // One that shows how it goes may wait for its reader.
        let asking = if how == FULL { Host::new() } else { deaf(how) };
        let migrating = asking.start_at(&destination, ["migrate", "tern", "--to", &to, "--json"]);
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

/// A migration that is under way, and lasts until somebody ends it.
struct UnderWay {
    source: Host,
    running: Process,
    _receiving: Receiving,
    to: String,
    migrating: Process,
}

impl UnderWay {
    fn new(guest: &[&str]) -> Self {
        let source = Host::new();
        let running = source.run("tern", guest);
        let receiving = Host::new().receive(&[]);
        let migrating = source.migrate("tern", receiving.address, &ENDLESS);
        migrating.says("round 2:");
        Self { source, running, to: receiving.address.to_string(), _receiving: receiving, migrating }
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

        // Another is refused, and says what there is to do.
        let again = under_way.source.migrate("tern", "127.0.0.1:1", &[]).wait().expect_code(11);
        let goes = format!("tern is migrating to {} already", under_way.to);
        again.says(&goes).says("`sterna migrate tern --watch`").says("`sterna cancel tern`");
        assert_eq!(again.json()["exit"], "refused");

        // Who watches and leaves cancels nothing.
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
        moves_away_from(&source, running, "tern", &[]);
    }
}

#[test]
fn all_who_watch_a_migration_read_the_same_report() {
    let under_way = UnderWay::new(&[BUSY]);
    let watching = [under_way.watch(), under_way.watch()];
    under_way.source.start(["migrate", "tern", "--set=downtime-limit=60000"]).wait().expect_code(0);
    let report = under_way.migrating.wait().expect_code(0).json();
    assert_eq!(report["status"], "completed");
    for watching in watching {
        assert_eq!(watching.wait().expect_code(0).json(), report);
    }
    under_way.running.wait().expect_code(0);
}

#[test]
fn a_client_that_does_not_read_misses_rounds_and_not_the_end() {
    let under_way = UnderWay::new(&["--working-set=1M", BUSY]);
    let watching = under_way.watch();
    under_way.migrating.signal(libc::SIGSTOP);
    // More than its socket holds.
    watching.says("round 1000:");
    under_way.cancel();
    watching.wait().expect_code(130);
    runs_on(&under_way.source, "tern");

    under_way.migrating.signal(libc::SIGCONT);
    let ended = under_way.migrating.wait().expect_code(130);
    assert!(!ended.stderr.contains("round 600:"), "its socket holds {} lines", ended.stderr.lines().count());
    moves_away_from(&under_way.source, under_way.running, "tern", &[]);
}

//! Output that nobody reads and terminals that hang up: neither ends a process that holds a guest, and no exit code changes.
#![cfg(feature = "cli")]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};

use common::{Host, Process, runs_on, wait_until};

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

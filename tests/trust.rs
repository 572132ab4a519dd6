//! Hosts that prove who they are: each way in which one is not the right one is refused with a reason at both
//! ends, and nothing that crosses the wire says what is moved.
#![cfg(feature = "cli")]

mod common;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Host, Process, Receiving, runs_on};
use sterna::wire::{PREAMBLE_LEN, Preamble, Protection, Role};

/// TLS within this machine, too.
const TLS: &str = "--encrypt=control";

/// The fingerprint of a host's key, as its operator sees it.
fn key_of(host: &Host) -> String {
    let ended = host.start(["trust", "show"]).wait().expect_code(0);
    let key = ended.stdout.trim().to_owned();
    assert!(key.starts_with("SHA256:") && key.len() == 50, "{key}");
    key
}

/// One host trusts another, for these rights or all.
fn trusts(host: &Host, name: &str, key: &str, may: &[&str]) {
    host.start([&["trust", "add", name, key], may].concat()).wait().expect_code(0);
}

/// Two hosts that trust each other, by two commands each.
fn friends() -> (Host, Host) {
    let (source, destination) = (Host::new(), Host::new());
    let (source_key, destination_key) = (key_of(&source), key_of(&destination));
    trusts(&source, "destination", &destination_key, &[]);
    trusts(&destination, "source", &source_key, &[]);
    (source, destination)
}

/// What crossed the wire in one direction of a connection.
type Crossed = Arc<Mutex<Vec<Vec<u8>>>>;

/// Passes everything on to `destination`, and keeps it.
fn recorder(destination: SocketAddr) -> (SocketAddr, Crossed) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let (address, crossed) = (listener.local_addr().expect("it is bound"), Crossed::default());
    let kept = crossed.clone();
    thread::spawn(move || {
        for source in listener.incoming().flatten() {
            let Ok(there) = TcpStream::connect(destination) else { continue };
            for (from, to) in [(&source, &there), (&there, &source)] {
                let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor is left");
                let (mut from, mut to, kept) = (clone(from), clone(to), kept.clone());
                let number = {
                    let mut kept = kept.lock().unwrap();
                    kept.push(Vec::new());
                    kept.len() - 1
                };
                thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        kept.lock().unwrap()[number].extend(&bytes[..count]);
                        if to.write_all(&bytes[..count]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
    (address, crossed)
}

fn contains(crossed: &Crossed, what: &[u8]) -> bool {
    crossed.lock().unwrap().iter().any(|bytes| bytes.windows(what.len()).any(|window| window == what))
}

/// Whether what follows a preamble, if one does, is records of TLS and nothing else.
fn is_all_tls(bytes: &[u8]) -> bool {
    let preamble = bytes.get(..PREAMBLE_LEN).filter(|bytes| bytes.starts_with(b"STERNA"));
    let mut rest = &bytes[preamble.map_or(0, <[u8]>::len)..];
    while let [kind, 3, _, high, low, after @ ..] = rest {
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        if !(20..=23).contains(kind) || after.len() < len {
            // The last one may have been cut by the end of the connection.
            return after.len() < len;
        }
        rest = &after[len..];
    }
    rest.len() < 5
}

#[test]
fn a_migration_over_tls_shows_neither_the_guest_nor_its_memory() {
    const NAME: &str = "a-name-that-occurs-once";
    // Pages of a fresh guest are mostly zeros; ciphertext has no such run.
    let zeros = [0; 64];
    for encrypted in [false, true] {
        let (source, destination) = friends();
        let running = source.run(NAME, &[]);
        let how: &[&str] = if encrypted { &["--encrypt=required"] } else { &[] };
        let receiving = destination.receive(&[&["--once"], how].concat());
        let (via, crossed) = recorder(receiving.address);
        let more = [&["--verify=full", "--transport=tcp", "--lanes=2"], how].concat();
        source.migrate(NAME, via, &more).wait().expect_code(0);
        running.wait().expect_code(0);
        runs_on(&destination, NAME);
        // Without TLS the recording does show both: the search finds what is there.
        assert_eq!(contains(&crossed, NAME.as_bytes()), !encrypted);
        assert_eq!(contains(&crossed, &zeros), !encrypted);
        let crossed = crossed.lock().unwrap();
        assert!(crossed.len() >= 6, "a control channel and two lanes, in two directions");
        assert_eq!(crossed.iter().all(|bytes| is_all_tls(bytes)), encrypted);
    }
}

/// A guest at a source, and a destination that waits for one.
struct Scene {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
}

impl Scene {
    fn new((source, destination): (Host, Host), receive: &[&str]) -> Self {
        let running = source.run("tern", &[]);
        let receiving = destination.receive(receive);
        Self { source, running, destination, receiving }
    }

    /// Asserts that the guest cannot move, for these reasons at either end, and runs on meanwhile.
    #[track_caller]
    fn is_refused(&self, how: &[&str], at_source: &[&str], at_destination: &[&str]) {
        let ended = self.source.migrate("tern", self.receiving.address, how).wait().expect_code(11);
        for reason in at_source {
            ended.says(reason);
        }
        for reason in at_destination {
            self.receiving.process.says(reason);
        }
        runs_on(&self.source, "tern");
        assert_eq!(self.destination.last_record("tern"), None, "nothing was begun");
    }

    /// Asserts that the guest moves now, to the same destination.
    fn moves(self, how: &[&str]) {
        let how = [how, &["--verify=full"]].concat();
        self.source.migrate("tern", self.receiving.address, &how).wait().expect_code(0);
        self.running.wait().expect_code(0);
        runs_on(&self.destination, "tern");
    }
}

#[test]
fn hosts_that_do_not_trust_each_other_yet_say_what_is_missing_and_go_on_once_it_is_mended() {
    let scene = Scene::new((Host::new(), Host::new()), &[TLS]);
    let (source_key, destination_key) = (key_of(&scene.source), key_of(&scene.destination));
    let here = format!("sterna trust add NAME {destination_key}");
    let there = format!("does not trust this host's key {destination_key}");
    scene.is_refused(&[TLS], &["is not trusted by this host", &here], &[&there]);
    trusts(&scene.source, "destination", &destination_key, &[]);
    let here = format!("does not trust this host's key {source_key}");
    let there = format!("sterna trust add NAME {source_key}");
    scene.is_refused(&[TLS], &[&here], &["is not trusted by this host", &there]);
    // The list is read anew: the same process takes the guest.
    trusts(&scene.destination, "source", &source_key, &[]);
    scene.moves(&[TLS]);
}

#[test]
fn a_host_does_no_more_than_it_may() {
    let (source, destination) = friends();
    let (source_key, destination_key) = (key_of(&source), key_of(&destination));
    let scene = Scene::new((source, destination), &[TLS]);
    trusts(&scene.destination, "source", &source_key, &["--may=receive,ask"]);
    let reason = "its list does not let this host do that";
    scene.is_refused(&[TLS], &[reason], &["source is trusted by this host, but may not send guests"]);
    trusts(&scene.destination, "source", &source_key, &["--may=send"]);
    trusts(&scene.source, "destination", &destination_key, &["--may=send,images"]);
    let reason = "destination is trusted by this host, but may not receive guests of this host";
    scene.is_refused(&[TLS], &[reason], &[]);
    trusts(&scene.source, "destination", &destination_key, &["--may=receive"]);
    scene.moves(&[TLS]);
}

#[test]
fn a_host_that_is_removed_or_has_another_key_is_trusted_no_more() {
    let scene = Scene::new(friends(), &[TLS]);
    let old = key_of(&scene.source);
    scene.source.start(["trust", "rotate"]).wait().expect_code(0).says("has a new key");
    let new = key_of(&scene.source);
    assert_ne!(old, new);
    scene.is_refused(&[TLS], &["does not trust this host's key", &new], &[&new]);
    trusts(&scene.destination, "source", &new, &[]);
    scene.destination.start(["trust", "remove", "source"]).wait().expect_code(0);
    scene.is_refused(&[TLS], &["does not trust this host's key"], &[]);
    scene.destination.start(["trust", "remove", "source"]).wait().expect_code(11);
    let listed = scene.destination.start(["trust", "list", "--json"]).wait().expect_code(0);
    assert_eq!(listed.stdout, "");
    trusts(&scene.destination, "source", &new, &["--may=send"]);
    let listed = scene.destination.start(["trust", "list", "--json"]).wait().expect_code(0).json();
    assert_eq!((&listed["name"], &listed["may"][0]), (&"source".into(), &"send".into()));
    scene.moves(&[TLS]);
}

#[test]
fn an_end_with_tls_and_an_end_without_refuse_each_other_and_say_so() {
    let scene = Scene::new(friends(), &[TLS]);
    let asks = ["asks for TLS, and this side is to do without", "sterna trust"];
    scene.is_refused(&[], &asks, &["does without TLS, which this side asks for"]);
    scene.is_refused(&["--insecure"], &[asks[0], "warning: --insecure"], &[]);
    scene.moves(&[TLS]);

    let scene = Scene::new(friends(), &["--insecure"]);
    scene.receiving.process.says("warning: --insecure");
    let does_without = ["does without TLS, which this side asks for", "sterna trust"];
    scene.is_refused(&[TLS], &does_without, &["asks for TLS, and this side is to do without"]);
    scene.moves(&["--insecure"]);
}

#[test]
fn pages_that_must_be_encrypted_take_no_way_that_does_not_encrypt() {
    let (source, destination) = friends();
    let running = source.run("tern", &[]);
    let receiving = destination.receive(&["--encrypt=required"]);
    let how = ["--encrypt=required", "--transport=rdma"];
    source.migrate("tern", receiving.address, &how).wait().expect_code(2).says("RDMA does not encrypt");
    let ended = source.migrate("tern", receiving.address, &["--encrypt=required"]).wait().expect_code(0);
    assert_eq!(ended.json()["transport"], "tcp");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn strangers_in_the_middle_of_a_greeting_are_turned_away_and_the_guest_comes_all_the_same() {
    let scene = Scene::new(friends(), &[TLS]);
    let preamble = |role, protection| Preamble { role, protection }.encode();
    let hello_of_tls_1_2 = {
        let extensions = [0, 16, 0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 29];
        let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0xc0, 0x2f], &[1, 0], &extensions].concat();
        let len = u8::try_from(body.len()).expect("it is short");
        [&[22, 3, 1, 0, len + 4, 1, 0, 0, len][..], &body].concat()
    };
    let tls = preamble(Role::Control, Protection::Tls);
    let strangers: [(&[u8], &[u8], &str); 5] = [
        (&tls, b"GET / HTTP/1.1\r\n\r\n", "bytes that are not TLS"),
        (&tls, &hello_of_tls_1_2, "does not speak TLS 1.3"),
        (&tls, &hello_of_tls_1_2[..20], "closed the connection during the TLS handshake"),
        (&preamble(Role::Lane, Protection::Plain), &[7; 20], "does without TLS"),
        (&preamble(Role::Control, Protection::Plain), &[], "does without TLS"),
    ];
    for (preamble, then, reason) in strangers {
        let mut stream = TcpStream::connect(scene.receiving.address).expect("it listens");
        stream.write_all(preamble).and_then(|()| stream.write_all(then)).expect("it reads");
        stream.shutdown(Shutdown::Write).expect("it is connected");
        let mut answer = Vec::new();
        let _ = io::copy(&mut stream, &mut answer);
        scene.receiving.process.says(reason);
    }
    assert_eq!(scene.destination.last_record("tern"), None);
    scene.moves(&[TLS]);
}

#[test]
fn a_file_crosses_by_tls_between_hosts_that_may_exchange_files() {
    let (source, destination) = friends();
    let file = source.runtime().join("picture.img");
    std::fs::write(&file, vec![7; 5 << 20]).expect("the folder is writable");
    let into = destination.runtime().join("copy.img");
    let receiving = destination.receive(&[&format!("--into={}", into.display()), "--encrypt=required"]);
    let send = |host: &Host| {
        let (file, to) = (file.display().to_string(), format!("--to={}", receiving.address));
        host.start(["send", &file, &to, TLS, "--json"]).wait()
    };
    trusts(&source, "destination", &key_of(&destination), &["--may=receive"]);
    send(&source).expect_code(11).says("may not exchange files with this host");
    trusts(&source, "destination", &key_of(&destination), &["--may=images"]);
    send(&source).expect_code(0);
    receiving.process.wait().expect_code(0);
    assert_eq!(std::fs::read(&into).expect("it is stored"), vec![7; 5 << 20]);
}

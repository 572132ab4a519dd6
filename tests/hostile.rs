//! What a peer sends that keeps to the protocol and lies: nothing of it is shown as it is or printed as this
//! host's own figure, and the guest stays where it is.
#![cfg(feature = "cli")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Fate, From, Host, Process, Receiving, moves_away_from, relay, runs_on};
use serde_json::Value;
use sterna::wire::{Completion, Message, Refusal};

/// A text that would erase its line and print another.
const FORGED: &str = "no\x1b[2K\r\nwhere: at the destination, running\u{202e}";

/// A guest on its way to a destination whose messages are forged.
struct Crossing {
    source: Host,
    running: Process,
    destination: Host,
    _receiving: Receiving,
    via: SocketAddr,
}

fn crossing(mut forge: impl FnMut(&Message) -> Option<Message> + Send + 'static) -> Crossing {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--dirty-rate=20"]);
    let receiving = destination.receive(&[]);
    let via = relay(receiving.address, move |_, from, message| {
        let forged = Some(message).filter(|_| from == From::Destination).and_then(&mut forge);
        forged.map_or(Fate::Pass, |message| Fate::Forge(Box::new(message)))
    });
    Crossing { source, running, destination, _receiving: receiving, via }
}

fn prepared_with(
    change: impl Fn(Completion) -> Completion + Send + 'static,
) -> impl FnMut(&Message) -> Option<Message> {
    move |message| match message {
        Message::Prepared(attempt_id, completion) => {
            Some(Message::Prepared(*attempt_id, change(*completion)))
        }
        _ => None,
    }
}

#[test]
fn a_destination_that_claims_to_have_compared_other_pages_gets_no_guest() {
    for pages in [0, 1, u64::MAX] {
        let claim = move |completion| Completion { verified_pages: pages, ..completion };
        let Crossing { source, running, destination: _destination, _receiving, via } =
            crossing(prepared_with(claim));
        let ended = source.migrate("tern", via, &["--verify=full"]).wait().expect_code(10);
        ended.says("a malformed number of compared pages");
        runs_on(&source, "tern");
        moves_away_from(&source, running, "tern", &[]);
    }
}

#[test]
fn a_destinations_times_are_no_longer_than_what_the_source_measured() {
    let claim =
        |completion| Completion { revoke_us: u64::MAX, verify_us: u64::MAX, load_us: 7, ..completion };
    let Crossing { source, running, destination, _receiving, via } = crossing(prepared_with(claim));
    let ended = source.migrate("tern", via, &["--verify=full"]).wait().expect_code(0);
    let report = ended.json();
    let parts = report["downtime_measured"].as_object().expect("it has parts");
    let total = report["downtime_ms"].as_f64().expect("it has a downtime");
    let sum: f64 =
        parts.iter().filter(|(name, _)| *name != "total_ms").filter_map(|(_, part)| part.as_f64()).sum();
    assert!((sum - total).abs() < 1.0, "{report}");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn a_guests_first_heartbeat_is_not_later_than_its_message() {
    let Crossing { source, running, destination, _receiving, via } = crossing(|message| match message {
        Message::Alive(attempt_id, count, _) => Some(Message::Alive(*attempt_id, *count, u64::MAX)),
        _ => None,
    });
    let report = source.migrate("tern", via, &[]).wait().expect_code(0).json();
    let (felt, total) = (&report["guest_downtime_ms"], report["total_ms"].as_f64().expect("a total"));
    assert!(felt.as_f64().is_none_or(|felt| felt < total + 60_000.0), "{report}");
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
}

#[test]
fn a_destinations_reasons_reach_the_terminal_escaped() {
    let reasons: [fn(&Message) -> Option<Message>; 2] = [
        |message| match message {
            Message::Ready(..) => Some(Message::Refused(Refusal::Incompatible(FORGED.into()))),
            _ => None,
        },
        |message| match message {
            Message::Prepared(attempt_id, _) => Some(Message::Abort(*attempt_id, FORGED.into())),
            _ => None,
        },
    ];
    for forge in reasons {
        let Crossing { source, running, destination: _destination, _receiving, via } = crossing(forge);
        let ended = source.migrate("tern", via, &[]).wait();
        ended.says(r"no\u{1b}[2K\r\nwhere: at the destination, running\u{202e}");
        is_plain(&ended.json());
        runs_on(&source, "tern");
        moves_away_from(&source, running, "tern", &[]);
    }
}

/// Each is followed by another: a destination that greets one connection at a time never gets to the source.
#[test]
fn silent_and_dripping_strangers_delay_no_source() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--dirty-rate=20"]);
    let receiving = destination.receive(&[]);
    let (address, over) = (receiving.address, AtomicBool::new(false));
    let stranger = &|drips: bool| {
        while !over.load(Ordering::Relaxed) {
            let Ok(mut stream) = TcpStream::connect(address) else { continue };
            stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a time limit");
            // Until the destination closes it.
            while !over.load(Ordering::Relaxed) && !matches!(stream.read(&mut [0]), Ok(0)) {
                if drips && stream.write_all(&[0x53]).is_err() {
                    break;
                }
            }
        }
    };
    thread::scope(|scope| {
        for number in 0..40 {
            scope.spawn(move || stranger(number % 2 == 0));
        }
        let ended = source.migrate("tern", address, &["--transport=tcp"]).wait();
        over.store(true, Ordering::Relaxed);
        ended.expect_code(0);
    });
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    drop(receiving);
}

fn is_plain(report: &Value) {
    let error = report["error"].as_str().expect("it says why");
    assert!(!error.contains(char::is_control), "{error:?}");
}

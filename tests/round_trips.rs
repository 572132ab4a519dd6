//! A guest that moves to another host and back, with a kill at a random moment of each round trip. Afterwards
//! the text and the exit code of `sterna recover` are true at both hosts.
//!
//! `STERNA_TRIPS=50 cargo test --test round_trips -- --nocapture` makes more trips; `STERNA_TRIPS_SEED=7`
//! begins with another seed. Each trip is printed.
#![cfg(feature = "cli")]

mod common;

use std::thread;
use std::time::Duration;

use common::{Host, Process, Random, runs_on, wait_until};
use sterna::handover::{RecordKind, Side};

/// A host, and its process that has the guest or waits for it.
struct End {
    host: Host,
    process: Option<Process>,
    /// The guest's name, another one for each trip.
    name: String,
}

impl End {
    fn new() -> Self {
        Self { host: Host::new(), process: None, name: String::new() }
    }

    fn is_alive(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| !process.has_ended())
    }

    fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            if !process.has_ended() {
                process.signal(libc::SIGKILL);
            }
            wait_until("the killed process has ended", || process.has_ended());
        }
    }

    fn last(&self) -> Option<(RecordKind, Side)> {
        let sighting = self.host.sighting(&self.name)?;
        sighting.journal.last().map(|last| (last.mark, last.side))
    }

    fn runs(&self) -> bool {
        self.host.phase(&self.name).as_deref() == Some("running")
    }

    /// The text of `recover` on this host, and its exit code.
    fn recover(&self) -> (i32, String) {
        let ended = self.host.start(["recover", self.name.as_str(), "--json"]).wait();
        let says = if ended.stdout.is_empty() {
            ended.stderr.clone()
        } else {
            ended.json()["guest"].as_str().unwrap_or_default().to_owned()
        };
        (ended.code.unwrap_or(-1), says)
    }
}

/// The processes to kill.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Source,
    Destination,
    Both,
}

/// One leg: from one host to the other. Returns whether the guest arrived undisturbed.
fn leg(from: &mut End, to: &mut End, kill: Option<(Victim, Duration)>) -> bool {
    let receiving = to.host.receive(&[]);
    let address = receiving.address;
    to.process = Some(receiving.process);
    let mut migrating = from.host.migrate(&from.name, address, &["--transport=tcp"]);
    let Some((victim, after)) = kill else {
        migrating.wait().expect_code(0);
        wait_until("the source's process has ended", || !from.is_alive());
        wait_until("it runs at the destination", || to.runs());
        return true;
    };
    thread::sleep(after);
    if matches!(victim, Victim::Source | Victim::Both) {
        from.kill();
    }
    if matches!(victim, Victim::Destination | Victim::Both) {
        to.kill();
    }
    wait_until("migrate has ended", || migrating.has_ended());
    // A ready destination that has lost its source waits for ten minutes: the source's process, or an
    // operator, asks.
    false
}

/// Asserts that the reports at a host match its state.
fn check(end: &mut End, other: &End) {
    let (alive, last) = (end.is_alive(), end.last());
    let (code, says) = end.recover();
    let after = end.last();
    let truth = format!("alive {alive}, last {last:?}, then {after:?}: {code} `{says}`");
    let expect = |codes: &[i32], words: &[&str]| {
        assert!(codes.contains(&code) && words.iter().any(|word| says.contains(word)), "{truth}");
    };
    match (alive, last, after) {
        (true, ..) if end.runs() => expect(&[0], &["runs here"]),
        (true, Some((RecordKind::Committed, _)), _) => {
            expect(&[0, 12], &["perhaps runs", "has moved", "runs here"]);
        }
        (true, Some((RecordKind::Done, _)), _) => expect(&[0], &["has moved"]),
        (true, Some((RecordKind::Prepared, _)), _) => expect(&[12], &["ready to run here"]),
        // It waits for a guest; its last record, if any, gives the fate of the last one.
        (true, ..) => expect(&[0, 10, 11, 13], &[""]),
        (false, Some((RecordKind::Committed, _)), Some((RecordKind::Done, _))) => {
            expect(&[0], &["runs at", "has run there"]);
        }
        (false, Some((RecordKind::Committed, _)), Some((RecordKind::Refused, _))) => {
            expect(&[13], &["never will"]);
        }
        (false, Some((RecordKind::Committed, _)), _) => expect(&[12], &["may run there"]),
        (false, Some((RecordKind::Running, _)), _) => expect(&[13], &["has run here since it came from"]),
        (false, Some((RecordKind::Done, _)), _) => expect(&[0], &["has moved from here"]),
        (false, Some((RecordKind::Prepared | RecordKind::Refused, Side::Destination)), _) => {
            expect(&[10], &["did not run here and never will"]);
        }
        (false, Some((RecordKind::Started, _) | (RecordKind::Refused, Side::Source)), _) => {
            expect(&[13], &["may be started anew"]);
        }
        (false, None, _) => expect(&[11], &["is not known here"]),
        (false, Some((RecordKind::Prepared, Side::Source)), _) => panic!("{truth}"),
    }
    // No report at this host contradicts the state of the other host.
    if says.contains("may be started anew") || says.contains("runs here") {
        assert!(!other.runs(), "it runs at the other host: {truth}");
    }
}

fn trip(seed: u64, a: &mut End, b: &mut End) -> &'static str {
    let mut random = Random(seed);
    for end in [&mut *a, &mut *b] {
        end.name = format!("tern-{seed}");
    }
    a.process = Some(a.host.run(&a.name, &["--dirty-rate=50"]));
    let victim =
        [Victim::Source, Victim::Destination, Victim::Both][usize::try_from(random.below(3)).unwrap_or(0)];
    let after = Duration::from_millis(random.below(600));
    let kill = Some((victim, after));
    let on_the_way_back = random.below(2) == 0;
    if on_the_way_back {
        leg(a, b, None);
        leg(b, a, kill);
    } else {
        leg(a, b, kill);
    }
    // A living process settles its doubt by itself if it can.
    thread::sleep(Duration::from_millis(50));
    for _ in 0..2 {
        check(a, b);
        check(b, a);
    }
    let end = match (a.runs(), b.runs()) {
        (true, true) => panic!("it runs twice"),
        (true, false) => "runs at a",
        (false, true) => "runs at b",
        (false, false) => "runs nowhere",
    };
    for end in [&mut *a, &mut *b] {
        if end.runs() {
            runs_on(&end.host, &end.name);
            end.host.checks_clean(&end.name);
        }
        end.kill();
    }
    end
}

#[test]
fn recover_tells_the_truth_after_a_kill_at_any_moment_of_a_round_trip() {
    let number = |name: &str, default| {
        std::env::var(name).map_or(default, |text| text.parse().expect("it is a number"))
    };
    let (trips, first): (u64, u64) = (number("STERNA_TRIPS", 6), number("STERNA_TRIPS_SEED", 0));
    let (mut a, mut b) = (End::new(), End::new());
    for seed in first..first + trips {
        println!("trip {seed}");
        let end = trip(seed, &mut a, &mut b);
        println!("trip {seed}: {end}");
    }
}

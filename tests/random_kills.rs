//! SIGKILL at random moments to the process that holds a guest, to the process that receives it, or to both.
//! The guest never runs twice, the commands' reports are true, and the guest runs on wherever the design says
//! that it is kept.
//!
//! `STERNA_KILLS=200 cargo test --test random_kills -- --nocapture` tries more moments. `STERNA_SEED` is the
//! first kill's seed; each later kill uses the next number. A seed always draws the same plan; how far the
//! migration is by then depends on the machine.
#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{
    Ended, Fate, Host, PATIENCE, Process, Random, Receiving, in_a_lab, never_runs_twice, phase, relay,
    runs_on, wait_until,
};
use sterna::handover::RecordKind;
use sterna::wire::Message;

/// How many guests move at once: they mostly wait.
const AT_ONCE: usize = 4;

/// The delay of the slow link for each message of the switch, as over a link of 10 ms. So kills hit all
/// states of the switch and not only those that wait for a disk.
const LATENCY: Duration = Duration::from_millis(5);

#[test]
fn whoever_is_killed_whenever_the_guest_never_runs_twice_and_what_is_said_of_it_is_true() {
    let kills = number("STERNA_KILLS").unwrap_or(if in_a_lab() { 6 } else { 24 });
    let seed = number("STERNA_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() * 1000)
    });
    println!("{kills} kills: STERNA_KILLS={kills} STERNA_SEED={seed}");
    let usual = [Link::Direct, Link::Slow].map(Usual::of);
    println!("undisturbed: {usual:?}");
    let (next, ends) = (AtomicU64::new(0), Mutex::new(BTreeMap::<String, u64>::new()));
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        let work = || {
            loop {
                let kill = next.fetch_add(1, Ordering::Relaxed);
                if kill >= kills || failed.load(Ordering::Relaxed) {
                    return;
                }
                let plan = Plan::draw(seed + kill, &usual);
                let begun = Instant::now();
                let Ok(end) = catch_unwind(AssertUnwindSafe(|| plan.carry_out())) else {
                    println!("failed with STERNA_KILLS=1 STERNA_SEED={}: {plan:?}", seed + kill);
                    failed.store(true, Ordering::Relaxed);
                    return;
                };
                println!("{}: {end}, {:.1} s", seed + kill, begun.elapsed().as_secs_f64());
                *ends.lock().unwrap_or_else(PoisonError::into_inner).entry(end.to_string()).or_default() += 1;
            }
        };
        (0..AT_ONCE).for_each(|_| drop(scope.spawn(work)));
    });
    for (end, count) in &*ends.lock().unwrap_or_else(PoisonError::into_inner) {
        println!("{count:>5}  {end}");
    }
    assert!(!failed.load(Ordering::Relaxed), "see above which");
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("it is a number"))
}

/// The processes to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
    /// Both, with this time between.
    SourceThenDestination(Duration),
    DestinationThenSource(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Direct,
    /// Through a relay that delays the messages of the switch.
    Slow,
}

/// The moment of the kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After the start of the migration.
    AfterBegin(Duration),
    /// After this message of [`SWITCH`] passed the relay.
    AfterMessage(usize, Duration),
}

/// The messages of the switch, as the end of a sentence.
const SWITCH: [&str; 5] = ["FINAL", "PREPARED", "GO", "RUNNING", "DONE"];

fn place_in_switch(message: &Message) -> Option<usize> {
    match message {
        Message::Final(_) => Some(0),
        Message::Prepared(..) => Some(1),
        Message::Go(_) => Some(2),
        Message::Running(_) => Some(3),
        Message::Done(_) => Some(4),
        _ => None,
    }
}

/// One kill, drawn from its seed.
#[derive(Clone, Copy, Debug)]
struct Plan {
    victim: Victim,
    link: Link,
    moment: Moment,
    verify: &'static str,
    /// Whether a killed destination restarts at once instead of after the migration has ended.
    back_at_once: bool,
    /// The destination's address, used by this kill alone, so that no other process takes its port while it
    /// is down.
    address: Ipv4Addr,
}

/// How long an undisturbed migration takes.
#[derive(Clone, Copy, Debug)]
struct Usual {
    all: Duration,
    /// From FINAL to PREPARED; meaningless for a direct link, because the test does not see its messages.
    to_prepared: Duration,
}

impl Usual {
    fn of(link: Link) -> Self {
        let crossing = Crossing::new(link, Ipv4Addr::LOCALHOST);
        let begun = Instant::now();
        crossing.migrate("off").wait().expect_code(0);
        let all = begun.elapsed();
        let mut seen = crossing.seen.try_iter().map(|(_, at)| at);
        let to_prepared = seen.next().zip(seen.next()).map_or(Duration::ZERO, |(first, next)| next - first);
        Self { all, to_prepared }
    }
}

impl Plan {
    fn draw(seed: u64, usual: &[Usual; 2]) -> Self {
        let mut random = Random(seed);
        let apart = Duration::from_millis(random.below(30));
        let victim = match random.below(6) {
            0 | 1 => Victim::Source,
            2 | 3 => Victim::Destination,
            4 => Victim::SourceThenDestination(apart),
            _ => Victim::DestinationThenSource(apart),
        };
        // Past its end too: a kill that comes too late must also be reported as such.
        let (link, moment) = match random.below(4) {
            0 => (Link::Direct, Moment::AfterBegin(part_of(&mut random, usual[0].all.mul_f64(1.1)))),
            1 => (Link::Slow, Moment::AfterBegin(part_of(&mut random, usual[1].all.mul_f64(1.1)))),
            _ => {
                let message = usize::try_from(random.below(SWITCH.len() as u64)).unwrap_or(0);
                let at_most = if message == 0 { usual[1].to_prepared } else { 3 * LATENCY };
                (Link::Slow, Moment::AfterMessage(message, part_of(&mut random, at_most)))
            }
        };
        let verify = match random.below(3) {
            0 => "off",
            1 => "final",
            _ => "full",
        };
        let [_, high, middle, low] = u32::try_from(seed % (1 << 24)).unwrap_or(0).to_be_bytes();
        let address = Ipv4Addr::new(127, 1 | high, middle, low);
        Self { victim, link, moment, verify, back_at_once: random.below(2) == 0, address }
    }
}

/// A guest on its way, and what the test knows of its progress.
struct Crossing {
    source: Arc<Host>,
    running: Process,
    destination: Arc<Host>,
    receiving: Receiving,
    via: SocketAddr,
    /// The messages of the switch that the relay sees, by index in [`SWITCH`].
    seen: Receiver<(usize, Instant)>,
    /// How many of these messages have been passed on.
    passed: Arc<AtomicUsize>,
}

impl Crossing {
    fn new(link: Link, address: Ipv4Addr) -> Self {
        let (source, destination) = (Arc::new(Host::new()), Arc::new(Host::new()));
        let running = source.run("tern", &["--dirty-rate=50"]);
        let receiving = destination.receive(&[&format!("--listen={address}")]);
        let (sees, seen) = channel();
        let passed = Arc::new(AtomicUsize::new(0));
        let noting = passed.clone();
        let slow = |to| {
            relay(to, move |_, _, message| {
                if let Some(place) = place_in_switch(message) {
                    let _ = sees.send((place, Instant::now()));
                    thread::sleep(LATENCY);
                    noting.store(place + 1, Ordering::Relaxed);
                }
                Fate::Pass
            })
        };
        let via = if link == Link::Slow { slow(receiving.address) } else { receiving.address };
        Self { source, running, destination, receiving, via, seen, passed }
    }

    fn migrate(&self, verify: &str) -> Process {
        self.source.migrate("tern", self.via, &["--transport=tcp", &format!("--verify={verify}")])
    }

    /// Starts `sterna receive` again, at the same address, after it was killed.
    fn receive_again(&mut self) {
        wait_until("the killed process has ended", || self.receiving.process.has_ended());
        let address = self.receiving.address;
        let (listen, port) = (format!("--listen={}", address.ip()), format!("--port={}", address.port()));
        self.receiving.process = self.destination.start(["receive", "--json", &listen, &port]);
        self.receiving.process.event("listening");
    }

    fn kill_source(&mut self) {
        self.running.signal(libc::SIGKILL);
        wait_until("the source's process has ended", || self.running.has_ended());
    }

    fn kill_destination(&mut self) {
        self.receiving.process.signal(libc::SIGKILL);
        wait_until("the destination's process has ended", || self.receiving.process.has_ended());
    }

    /// The last record of the destination's journal.
    fn word_there(&self) -> Option<RecordKind> {
        self.destination.last_record("tern")
    }

    fn word_here(&self) -> Option<RecordKind> {
        self.source.last_record("tern").filter(|&mark| mark != RecordKind::Started)
    }

    fn runs_there_whole(&self) {
        self.receiving.process.event("arrived");
        runs_on(&self.destination, "tern");
        self.destination.checks_clean("tern");
        recovers(&self.destination, &[], &[0]);
    }
}

/// Asserts that `sterna recover` ends with one of these codes; returns the code. The end of a kill.
#[track_caller]
fn recovers(host: &Host, more: &[&str], codes: &[i32]) -> i32 {
    let ended = host.start(["recover", "tern", "--json"].iter().chain(more)).wait();
    let code = ended.code.unwrap_or(-1);
    assert!(codes.contains(&code), "{codes:?} expected: {ended:#?}");
    code
}

/// How it ended.
#[derive(Debug)]
struct End {
    victim: &'static str,
    when: String,
    code: i32,
    guest: &'static str,
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { victim, when, code, guest } = self;
        write!(formatter, "{victim} killed {when}, migrate ends with {code}: the guest {guest}")
    }
}

impl Plan {
    fn carry_out(&self) -> End {
        let mut crossing = Crossing::new(self.link, self.address);
        let (source, destination) = (crossing.source.clone(), crossing.destination.clone());
        never_runs_twice("tern", (&source, &destination), || self.kill_and_look(&mut crossing))
    }

    fn kill_and_look(&self, crossing: &mut Crossing) -> End {
        let begun = Instant::now();
        let migrating = crossing.migrate(self.verify);
        match self.moment {
            Moment::AfterBegin(after) => sleep_until(begun + after),
            Moment::AfterMessage(message, after) => {
                let mut at = None;
                while at.is_none() {
                    let (seen, when) = crossing.seen.recv_timeout(PATIENCE).expect("the switch goes on");
                    at = (seen == message).then_some(when);
                }
                sleep_until(at.unwrap_or(begun) + after);
            }
        }
        let when = match (self.link, crossing.passed.load(Ordering::Relaxed)) {
            (Link::Direct, _) => "some time".into(),
            (Link::Slow, 0) => "before FINAL".into(),
            (Link::Slow, passed) => format!("after {}", SWITCH[passed - 1]),
        };
        let victim = match self.victim {
            Victim::Source => {
                crossing.kill_source();
                "source"
            }
            Victim::Destination => {
                crossing.kill_destination();
                "destination"
            }
            Victim::SourceThenDestination(apart) => {
                crossing.kill_source();
                thread::sleep(apart);
                crossing.kill_destination();
                "source, then destination"
            }
            Victim::DestinationThenSource(apart) => {
                crossing.kill_destination();
                thread::sleep(apart);
                crossing.kill_source();
                "destination, then source"
            }
        };
        if self.victim == Victim::Destination && self.back_at_once {
            crossing.receive_again();
        }
        let ended = migrating.wait();
        let code = ended.code.unwrap_or(-1);
        let guest = match self.victim {
            Victim::Source => source_is_dead(crossing, &ended),
            Victim::Destination => destination_was_killed(crossing, &ended, self.back_at_once),
            _ => both_were_killed(crossing, &ended, self.back_at_once),
        };
        End { victim, when, code, guest }
    }
}

/// The destination is alive: it runs the guest, can run it, or waits for the next.
fn source_is_dead(crossing: &mut Crossing, ended: &Ended) -> &'static str {
    let Crossing { source, destination, .. } = &*crossing;
    match ended.code {
        Some(0) => {
            assert_eq!(crossing.word_there(), Some(RecordKind::Running), "{ended:#?}");
            recovers(source, &[], &[0]);
            crossing.runs_there_whole();
            return "runs at the destination";
        }
        Some(12) => {
            ended.says("the process that held the guest is gone");
        }
        Some(11) => {
            let untouched = ["not on this host under that name", "if the process that holds it is alive"];
            assert!(untouched.iter().any(|text| ended.stderr.contains(text)), "{ended:#?}");
        }
        _ => panic!("{ended:#?}"),
    }
    if crossing.word_here().is_some() {
        // COMMITTED: the destination may have received GO, and if not, `recover` has it sent now.
        recovers(source, &[], &[0]);
        assert_eq!(crossing.word_there(), Some(RecordKind::Running));
        crossing.runs_there_whole();
        return "runs at the destination, by recover";
    }
    recovers(source, &[], &[lost_or_unknown(source)]);
    let mut held = false;
    wait_until("the destination holds it, or lets go of it", || {
        held = destination.socket("tern").exists() && recovers(destination, &[], &[0, 10, 11, 12]) == 12;
        held || !destination.socket("tern").exists()
    });
    if held {
        assert_eq!(crossing.word_there(), Some(RecordKind::Prepared));
        recovers(destination, &["--run-destination", "--other-host-is-fenced"], &[0]);
        crossing.runs_there_whole();
        return "is held by the destination, and runs there by the operator's word";
    }
    recovers(destination, &[], &[10, 11]);
    // The guest ended with its process. Both hosts are ready for the next.
    let running = source.run("tern", &[]);
    wait_until("the destination takes another guest", || {
        let again = source.migrate("tern", crossing.receiving.address, &[]).wait();
        let busy = again.code == Some(11) && again.stderr.contains("another guest is arriving");
        assert!(busy || again.code == Some(0), "{again:#?}");
        !busy
    });
    running.wait().expect_code(0);
    crossing.runs_there_whole();
    "is lost with its process"
}

/// The source is alive: the guest runs at the source, unless the destination has run it.
fn destination_was_killed(crossing: &mut Crossing, ended: &Ended, back: bool) -> &'static str {
    let in_doubt = match ended.code {
        Some(0) => {
            assert_eq!(crossing.word_there(), Some(RecordKind::Running), "{ended:#?}");
            false
        }
        Some(10 | 11) => {
            ended.says("where: the guest runs on at the source");
            assert_ne!(crossing.word_there(), Some(RecordKind::Running), "{ended:#?}");
            false
        }
        Some(12) => {
            ended.says("in doubt");
            assert_eq!(crossing.word_here(), Some(RecordKind::Committed));
            true
        }
        _ => panic!("{ended:#?}"),
    };
    if in_doubt && !back {
        assert_eq!(phase(&crossing.source.socket("tern")).as_deref(), Some("paused"));
        recovers(&crossing.source, &[], &[12]);
        crossing.receive_again();
    }
    if in_doubt {
        let socket = crossing.source.socket("tern");
        wait_until("the doubt settles itself", || {
            crossing.running.has_ended() || phase(&socket).as_deref() == Some("running")
        });
    }
    if crossing.word_there() == Some(RecordKind::Running) {
        wait_until("the source's process has ended", || crossing.running.has_ended());
        recovers(&crossing.source, &[], &[0]);
        if back && phase(&crossing.destination.socket("tern")).is_some() {
            crossing.runs_there_whole();
            return "runs at the destination, which was back before it came";
        }
        recovers(&crossing.destination, &[], &[13]);
        return "ran at the destination and ended with its process there";
    }
    runs_on(&crossing.source, "tern");
    crossing.source.checks_clean("tern");
    recovers(&crossing.source, &[], &[0]);
    recovers(&crossing.destination, &[], &[10, 11]);
    let new = Host::new();
    let receiving = new.receive(&[]);
    crossing.source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    wait_until("the source's process has ended", || crossing.running.has_ended());
    receiving.process.event("arrived");
    runs_on(&new, "tern");
    new.checks_clean("tern");
    if in_doubt { "was in doubt and runs on at the source" } else { "runs on at the source" }
}

/// The guest runs on no host, and `recover` says so.
fn both_were_killed(crossing: &mut Crossing, ended: &Ended, look_there_first: bool) -> &'static str {
    let there = crossing.word_there();
    match ended.code {
        Some(0) => assert_eq!(there, Some(RecordKind::Running), "{ended:#?}"),
        // The migration had already failed: the source was killed a little later, or had already ended.
        Some(10 | 11) => assert_ne!(there, Some(RecordKind::Running), "{ended:#?}"),
        Some(12) => {}
        _ => panic!("{ended:#?}"),
    }
    let here = crossing.word_here();
    let known = match here {
        Some(RecordKind::Committed) => 12,
        Some(RecordKind::Done) => 0,
        Some(_) => 13,
        None => lost_or_unknown(&crossing.source),
    };
    recovers(&crossing.source, &[], &[known]);
    let ran = there == Some(RecordKind::Running);
    let look_there = |crossing: &Crossing| {
        let expected = match crossing.word_there() {
            Some(RecordKind::Running) => 13,
            Some(_) => 10,
            None => 11,
        };
        recovers(&crossing.destination, &[], &[expected]);
    };
    if look_there_first {
        look_there(crossing);
    }
    crossing.receive_again();
    let known = match here {
        Some(_) if ran => 0,
        Some(_) => 13,
        None => known,
    };
    recovers(&crossing.source, &[], &[known]);
    look_there(crossing);
    for host in [&crossing.source, &crossing.destination] {
        assert_eq!(phase(&host.socket("tern")), None, "nobody runs it");
    }
    if ran { "ran at the destination and ended with its process there" } else { "is lost with its process" }
}

/// The exit code at the source for a guest that ended with its process before COMMITTED: it is lost once a
/// journal was made for it.
fn lost_or_unknown(source: &Host) -> i32 {
    if source.sighting("tern").is_some() { 13 } else { 11 }
}

fn sleep_until(moment: Instant) {
    thread::sleep(moment.saturating_duration_since(Instant::now()));
}

fn part_of(random: &mut Random, whole: Duration) -> Duration {
    Duration::from_micros(random.below(u64::try_from(whole.as_micros()).unwrap_or(u64::MAX)))
}

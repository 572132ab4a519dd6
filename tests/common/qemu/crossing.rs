//! A guest of QEMU on its way between two hosts, and a fault on the way.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sterna::handover::RecordKind;
use sterna::wire::Message;

use super::super::{Ended, Fate, From, Host, Process, relay, wait_until};
use super::monitor::Monitor;
use super::moves::{Held, NAME, Waiting};
use super::running::Qemu;
use super::setup::Setup;

/// What is killed or cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Victim {
    SourceSterna,
    DestinationSterna,
    SourceQemu,
    DestinationQemu,
    /// The control connection.
    Link,
    None,
}

/// The moment of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// The source's first message.
    Hello,
    /// The lanes are ready.
    Bulk,
    /// The end of the second round.
    Rounds,
    /// The source QEMU has paused the guest.
    Paused,
    /// The first part of the saved state is sent.
    State,
    Final,
    Prepared,
    Go,
    Running,
}

/// A fault, a while after its moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) victim: Victim,
    pub(crate) at: At,
    pub(crate) delay: Duration,
}

/// Whether the moment of a fault came before the migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    Came,
    Missed,
}

/// How a disturbed migration ended.
#[derive(Debug)]
pub(crate) struct End {
    /// The exit code of `sterna migrate`.
    pub(crate) code: i32,
    pub(crate) strike: Strike,
    pub(crate) guest: &'static str,
    /// The state of the source QEMU when FINAL was sent: before the source can record that it gives the guest
    /// away.
    pub(crate) saved_in: Option<String>,
    /// The guest, after one more migration, unless its QEMU was killed.
    pub(crate) held: Option<Held>,
}

/// A guest that is to move through a relay.
pub(crate) struct Crossing<'a> {
    setup: &'a Setup<'a>,
    fault: Fault,
    source: Held,
    destination: Waiting,
    via: SocketAddr,
    trigger: Arc<Trigger>,
    /// The process that adopted the guest at the destination, after the one that received it was killed.
    adopted: Option<Process>,
    /// A further QEMU at the destination, after the first one took a guest.
    spare: Option<Qemu>,
}

/// Kills or cuts, once.
struct Trigger {
    fault: Fault,
    /// The process to kill.
    victim: i32,
    /// The moment has come.
    came: AtomicBool,
    done: AtomicBool,
    /// The link is cut.
    cut: AtomicBool,
    saved_in: Mutex<Option<String>>,
}

impl At {
    fn is(self, from: From, message: &Message) -> bool {
        match (self, message) {
            (Self::Hello, _) => from == From::Source,
            (Self::Bulk, Message::Ready(..))
            | (Self::State, Message::State(_))
            | (Self::Final, Message::Final(_))
            | (Self::Prepared, Message::Prepared(..))
            | (Self::Go, Message::Go(_))
            | (Self::Running, Message::Running(_)) => true,
            (Self::Rounds, Message::RoundClosed(round)) => *round >= 2,
            _ => false,
        }
    }

    /// How long after the moment the stage is in its middle.
    pub(crate) fn delay(self) -> Duration {
        Duration::from_millis(if self == Self::Bulk { 500 } else { 0 })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { victim, at, delay } = self;
        write!(formatter, "{victim:?} {:.1} ms after {at:?}", delay.as_secs_f64() * 1e3)
    }
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, strike, guest, .. } = self;
        write!(formatter, "({strike:?}) migrate ends with {code}, the guest {guest}")
    }
}

impl Trigger {
    /// The moment has come.
    fn pull(self: &Arc<Self>) {
        if self.came.swap(true, Ordering::Relaxed) {
            return;
        }
        if self.fault.delay.is_zero() {
            self.strike();
        } else {
            let later = self.clone();
            thread::spawn(move || {
                thread::sleep(later.fault.delay);
                later.strike();
            });
        }
    }

    fn strike(&self) {
        match self.fault.victim {
            Victim::None => {}
            Victim::Link => self.cut.store(true, Ordering::Relaxed),
            _ => kill(self.victim),
        }
        self.done.store(true, Ordering::Relaxed);
    }

    /// Waits for a fault whose moment has come; a moment that has not come never comes any more.
    fn settle(&self) -> Strike {
        if !self.came.swap(true, Ordering::Relaxed) {
            return Strike::Missed;
        }
        wait_until("the fault happens", || self.done.load(Ordering::Relaxed));
        Strike::Came
    }
}

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Stays,
    Moved,
    LostAtSource,
    LostAtDestination,
}

impl<'a> Crossing<'a> {
    /// The guest of a QEMU that is at work.
    pub(crate) fn new(setup: &'a Setup<'a>, qemu: Qemu, fault: Fault) -> Self {
        let destination = Waiting::start(setup);
        let source = Held::adopt(qemu, &[]);
        let of = |qemu: &Qemu| i32::try_from(qemu.id()).expect("process ids are positive i32");
        let victim = match fault.victim {
            Victim::SourceSterna => source.process.id(),
            Victim::DestinationSterna => destination.receiving.process.id(),
            Victim::SourceQemu => of(&source.qemu),
            Victim::DestinationQemu => of(&destination.qemu),
            Victim::Link | Victim::None => 0,
        };
        let [came, done, cut] = [(); 3].map(|()| AtomicBool::new(false));
        let trigger = Arc::new(Trigger { fault, victim, came, done, cut, saved_in: Mutex::default() });
        let (of_relay, monitor) = (trigger.clone(), source.qemu.monitor.clone());
        let via = relay(destination.receiving.address, move |number, from, message| {
            if number > 0 {
                return Fate::Pass;
            }
            if matches!(message, Message::Final(_)) {
                *of_relay.saved_in.lock().unwrap_or_else(PoisonError::into_inner) = status(&monitor);
            }
            if fault.at.is(from, message) {
                of_relay.pull();
            }
            if of_relay.cut.load(Ordering::Relaxed) { Fate::Cut } else { Fate::Pass }
        });
        if fault.at == At::Paused {
            let (monitor, trigger) = (source.qemu.monitor.clone(), trigger.clone());
            thread::spawn(move || {
                // QEMU does not answer while it saves its devices, nor once it has ended.
                while status(&monitor).as_deref() == Some("running") {
                    thread::sleep(Duration::from_millis(1));
                }
                trigger.pull();
            });
        }
        Self { setup, fault, source, destination, via, trigger, adopted: None, spare: None }
    }

    /// Moves the guest, and asserts what must be so after the fault. `more` may keep the migration in its
    /// rounds, until the fault.
    pub(crate) fn migrate(self, more: &[&str]) -> End {
        let monitors = [&self.source.qemu, &self.destination.qemu].map(|qemu| qemu.monitor.clone());
        never_runs_twice(monitors, || {
            let more = [&["--transport=tcp", "--verify=final"], more].concat();
            let mut migrating = self.source.migrate(self.via, &more);
            wait_until("the fault, or the end", || {
                self.trigger.done.load(Ordering::Relaxed) || migrating.has_ended()
            });
            let limits = json!({ "do": "set-limits", "downtime_limit": 60_000 });
            let _ = self.source.host.try_ask(NAME, &limits);
            let ended = migrating.wait();
            let strike = self.trigger.settle();
            self.look(&ended, strike)
        })
    }

    /// The migration has ended; the fault has happened, if ever.
    fn look(mut self, ended: &Ended, strike: Strike) -> End {
        let code = ended.code.unwrap_or(-1);
        let victim = self.fault.victim;
        wait_until("all threads of the killed process have ended", || {
            let Self { source, destination, .. } = &mut self;
            strike == Strike::Missed
                || match victim {
                    Victim::SourceSterna => source.process.has_ended(),
                    Victim::DestinationSterna => destination.receiving.process.has_ended(),
                    Victim::SourceQemu => source.qemu.has_ended(),
                    Victim::DestinationQemu => destination.qemu.has_ended(),
                    Victim::Link | Victim::None => true,
                }
        });
        let ran = ran(&self.destination.host);
        let source_lives = self.fault.victim != Victim::SourceSterna || strike == Strike::Missed;
        match code {
            0 => assert!(ran, "{ended:#?}"),
            10 | 11 => assert!(!ran, "{ended:#?}"),
            12 if source_lives && status(&self.source.qemu.monitor).as_deref() == Some("running") => {
                panic!("the guest is in doubt, and runs at the source: {ended:#?}")
            }
            12 => {}
            _ => panic!("{ended:#?}"),
        }
        self.bring_destination_back();
        self.bring_source_back();
        let mut outcome = None;
        wait_until("the guest runs on one host, or its QEMU has ended", || {
            outcome = self.outcome();
            outcome.is_some()
        });
        let outcome = outcome.expect("it was waited for");
        let guest = match outcome {
            Outcome::Stays => "runs on at the source",
            Outcome::Moved => "runs at the destination",
            Outcome::LostAtSource => "is lost with its QEMU at the source",
            Outcome::LostAtDestination => "is lost with its QEMU at the destination",
        };
        let saved_in = self.trigger.saved_in.lock().unwrap_or_else(PoisonError::into_inner).take();
        let held = self.recover_is_true(outcome);
        End { code, strike, guest, saved_in, held }
    }

    /// Starts what a host's operator would start after the host's process has died.
    fn bring_destination_back(&mut self) {
        let Waiting { host, receiving, qemu } = &mut self.destination;
        let ran = ran(host);
        if ran && qemu.has_ended() {
            wait_until("the process ends after its QEMU", || receiving.process.has_ended());
        }
        if !receiving.process.has_ended() {
            return;
        }
        if ran && !qemu.has_ended() {
            recovers(host, Some(qemu), &[0]);
            assert!(qemu.runs(), "{}", qemu.status());
            self.adopted = Some(adopt(host, qemu));
        }
        // Another guest may come, and the source of this one asks.
        let spare = match status(&qemu.monitor).as_deref() {
            Some("inmigrate") => None,
            _ => Some(self.setup.start_incoming()),
        };
        let socket = format!("--qmp={}", spare.as_ref().unwrap_or(qemu).qmp().display());
        let port = format!("--port={}", receiving.address.port());
        receiving.process = host.start(["receive", "--json", &port, &socket]);
        receiving.process.event("listening");
        self.spare = spare;
    }

    fn bring_source_back(&mut self) {
        let Held { host, process, qemu } = &mut self.source;
        if qemu.has_ended() && host.last_record(NAME) != Some(RecordKind::Committed) {
            wait_until("the process ends after its QEMU", || process.has_ended());
        }
        if !process.has_ended() {
            return;
        }
        match (host.last_record(NAME), qemu.has_ended()) {
            (Some(RecordKind::Done), is_over) => {
                recovers(host, (!is_over).then_some(&*qemu), &[0]);
            }
            (Some(RecordKind::Committed), true) => {
                recovers(host, None, &[0, 13]);
            }
            (_, true) => {
                recovers(host, None, &[13]);
            }
            (_, false) => self.source.process = adopt(host, qemu),
        }
    }

    fn outcome(&mut self) -> Option<Outcome> {
        let Self { source, destination, .. } = self;
        if ran(&destination.host) {
            if destination.qemu.has_ended() {
                return Some(Outcome::LostAtDestination);
            }
            return destination.qemu.runs().then_some(Outcome::Moved);
        }
        if source.host.last_record(NAME) == Some(RecordKind::Committed) {
            return None;
        }
        if source.qemu.has_ended() {
            return source.process.has_ended().then_some(Outcome::LostAtSource);
        }
        source.qemu.runs().then_some(Outcome::Stays)
    }

    /// Asserts that `recover` reports the outcome at both hosts, and that a guest that lives can be moved.
    fn recover_is_true(self, outcome: Outcome) -> Option<Held> {
        let Self { setup, mut source, destination, adopted, .. } = self;
        if matches!(outcome, Outcome::Moved | Outcome::LostAtDestination) {
            wait_until("the source lets go of the guest", || {
                source.process.has_ended() && source.qemu.has_ended()
            });
            recovers(&source.host, None, &[0]);
        }
        let held = match outcome {
            Outcome::Moved => {
                recovers(&destination.host, None, &[0]);
                let process = adopted.unwrap_or(destination.receiving.process);
                Held { host: destination.host, process, qemu: destination.qemu }
            }
            Outcome::Stays => {
                recovers(&source.host, None, &[0]);
                let mut code = 0;
                wait_until("the destination has given the guest up, or holds it ready", || {
                    code = recovers(&destination.host, None, &[0, 10, 11, 12]);
                    code != 0
                });
                source
            }
            Outcome::LostAtSource => {
                recovers(&source.host, None, &[13]);
                return None;
            }
            Outcome::LostAtDestination => {
                recovers(&destination.host, None, &[13]);
                return None;
            }
        };
        Some(held.move_to(setup, &["--downtime-limit=5000"]).0)
    }
}

/// Whether a host has recorded that it runs the guest, which a later process may have adopted, and not that
/// QEMU could not start the guest.
fn ran(host: &Host) -> bool {
    let Some(sighting) = host.sighting(NAME) else { return false };
    let journal = &sighting.journal;
    let last_of_attempt = journal.records().iter().filter_map(|record| journal.of(record.attempt_id));
    last_of_attempt.into_iter().any(|record| record.mark == RecordKind::Running)
}

/// `sterna adopt`, up to the moment when it holds the guest.
fn adopt(host: &Host, qemu: &Qemu) -> Process {
    let process = host.start(["adopt", NAME, "--json", &format!("--qmp={}", qemu.qmp().display())]);
    process.event("adopted");
    process
}

/// Asserts that `sterna recover` ends with one of these codes; returns the code.
#[track_caller]
fn recovers(host: &Host, qemu: Option<&Qemu>, codes: &[i32]) -> i32 {
    let socket = qemu.map(|qemu| format!("--qmp={}", qemu.qmp().display()));
    let ended = host.start(["recover", NAME, "--json"].into_iter().chain(socket.as_deref())).wait();
    let code = ended.code.unwrap_or(-1);
    assert!(codes.contains(&code), "{codes:?} expected: {ended:#?}");
    code
}

/// What a QEMU says of its guest; `None` if it does not answer.
fn status(monitor: &Monitor) -> Option<String> {
    let answer = monitor.try_execute("query-status", json!({})).ok()?;
    answer["status"].as_str().map(str::to_owned)
}

/// Looks again and again whether the second QEMU runs the guest, or did, and the first one runs it too.
fn never_runs_twice<T>(monitors: [Arc<Monitor>; 2], work: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    let watch = |[source, destination]: [Arc<Monitor>; 2]| {
        let (mut ran, mut samples) = (false, 0);
        while !over.load(Ordering::Relaxed) {
            ran |= status(&destination).as_deref() == Some("running");
            if ran && status(&source).as_deref() == Some("running") {
                return Err("the guest runs at the source, and did at the destination");
            }
            samples += 1;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(samples)
    };
    thread::scope(|scope| {
        let witness = scope.spawn(|| watch(monitors));
        let done = {
            let _over = Over(&over);
            work()
        };
        let samples = witness.join().expect("the witness does not panic");
        assert!(samples.is_ok_and(|samples| samples > 0), "{samples:?}");
        done
    })
}

/// Ends the witness, also if the work panics: the scope waits for the witness.
struct Over<'watched>(&'watched AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Kills a process of this test that was not waited for, through a shell's `kill`, and waits for its end.
fn kill(process: i32) {
    let killed = Command::new("kill").args(["-KILL", &process.to_string()]).status();
    assert!(killed.expect("there is a kill").success(), "{process} is not there any more");
    // Then it holds no socket and no lock, unless one of its threads has not ended yet.
    wait_until("the killed process has ended", || {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    });
}

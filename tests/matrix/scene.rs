//! One cell, played: two hosts, a link between them, a fault, and the outcome.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::cells::{Cell, Fault, Stage};
use crate::common::{
    BUSY, ENDLESS, Host, Process, Receiving, Tap, Then, Way, moves_away_from, runs_on, say_go, wait_until,
};

/// Longer than a peer may be silent.
const LONG: Duration = Duration::from_secs(25);
/// Shorter than the time for which a source keeps asking within its migration.
const SHORT: Duration = Duration::from_secs(2);

/// Both ends compare all memory at the switch.
const WHOLE: &str = "--verify=full";

/// How long a request to the guest's holder may take until it is received, even under other load.
const HEEDED: Duration = Duration::from_secs(2);

pub(crate) struct Scene {
    stage: Stage,
    fault: Fault,
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    link: Tap,
    /// `None` once it has ended.
    migrating: Option<Process>,
    watch: Watch,
    /// The answer to a cancellation.
    cancelled: Option<bool>,
}

impl Scene {
    /// Plays a migration up to a stage, causes the fault, and checks the outcome.
    pub(crate) fn play(stage: Stage, fault: Fault, cell: Cell) {
        let mut scene = Self::set(stage, fault);
        scene.happen();
        scene.becomes(cell);
    }

    fn set(stage: Stage, fault: Fault) -> Self {
        let host = |fails: bool| {
            // A write beyond the limit then fails instead of ending the process.
            if fails { Host::under(&["env", "--ignore-signal=XFSZ"]) } else { Host::new() }
        };
        let source = host(fault == Fault::SourceJournalFails);
        let destination = host(fault == Fault::DestinationJournalFails);
        let running = source.run("tern", &["--memory=16M", "--machine=synthetic", BUSY]);
        let receiving = destination.receive(match fault {
            Fault::DestinationOutOfMemory => &["--memory-max=8M"][..],
            _ => [].as_slice(),
        });
        let link = Tap::to(receiving.address);
        if fault == Fault::DigestMismatch {
            link.change_digests();
        }
        if let Some(message) = stage.stops_at(fault) {
            link.stop_at(message);
        }
        let watch = Watch::over(&source, &destination);
        let migrating = source.migrate("tern", link.address, &how(stage, fault));
        let mut migrating = Some(migrating);
        match stage {
            Stage::After => {
                migrating.take().map(|migrating| migrating.wait().expect_code(0));
            }
            _ if stage.stops_at(fault).is_some() => link.await_stop(),
            // Its first round never ends.
            _ if fault == Fault::TimedOut => link.await_message("Ready"),
            _ => link.await_message("RoundClosed"),
        }
        Self {
            stage,
            fault,
            source,
            running,
            destination,
            receiving,
            link,
            migrating,
            watch,
            cancelled: None,
        }
    }

    /// Causes the fault, and ends it if it has an end.
    fn happen(&mut self) {
        let (source, destination) = (&self.running, &self.receiving.process);
        let then = match self.fault {
            Fault::SourceKilled => {
                source.signal(libc::SIGKILL);
                Then::Lose
            }
            Fault::DestinationKilled => {
                destination.signal(libc::SIGKILL);
                Then::Lose
            }
            Fault::DestinationTerminated => {
                destination.signal(libc::SIGTERM);
                Then::Lose
            }
            Fault::BothKilled => {
                if self.stage != Stage::After {
                    source.signal(libc::SIGKILL);
                }
                destination.signal(libc::SIGKILL);
                Then::Lose
            }
            Fault::SourceStopped => {
                source.signal(libc::SIGSTOP);
                Then::Pass
            }
            Fault::DestinationStopped => {
                destination.signal(libc::SIGSTOP);
                Then::Pass
            }
            Fault::LinkCut => {
                self.link.cut();
                Then::Lose
            }
            Fault::LinkStalledToDestination => {
                self.link.stall(Way::ToDestination);
                Then::Pass
            }
            Fault::LinkStalledToSource => {
                self.link.stall(Way::ToSource);
                Then::Pass
            }
            Fault::ControlLost => {
                self.link.end_control();
                Then::Lose
            }
            Fault::LanesLost => {
                self.link.end_lanes();
                Then::Pass
            }
            Fault::SlowLink => {
                self.link.slow_down(2 << 10);
                Then::Pass
            }
            Fault::LoadFails => Then::OtherState,
            Fault::SourceJournalFails => {
                Host::forbid_writes(source);
                Then::Pass
            }
            Fault::DestinationJournalFails => {
                Host::forbid_writes(destination);
                Then::Pass
            }
            Fault::MessageCorrupt => Then::Corrupt,
            Fault::MessageOversized => Then::Oversize,
            Fault::MessageUnknown => Then::Unknown,
            Fault::MessageRepeated => Then::PassTwice,
            Fault::GoReplayed => {
                // Of this attempt once GO was sent, else of an earlier one.
                let said = matches!(self.stage, Stage::Running | Stage::After);
                say_go(self.receiving.address, self.link.attempt_id().filter(|_| said));
                Then::Pass
            }
            Fault::Cancelled => {
                // Through the control socket: its answer confirms the request.
                self.cancelled = Some(self.source.ask("tern", "cancel")["answer"] == "done");
                Then::Pass
            }
            Fault::MigrateTerminated => {
                let migrating = self.migrating.as_ref().expect("it has not ended");
                migrating.signal(libc::SIGTERM);
                migrating.says("cancelling");
                thread::sleep(HEEDED);
                Then::Pass
            }
            Fault::DestinationOutOfMemory | Fault::DigestMismatch | Fault::TimedOut => Then::Pass,
        };
        self.link.go_on(then);
        match self.fault {
            Fault::SourceStopped => {
                thread::sleep(LONG);
                self.running.signal(libc::SIGCONT);
            }
            Fault::DestinationStopped => {
                thread::sleep(LONG);
                self.receiving.process.signal(libc::SIGCONT);
            }
            Fault::LinkStalledToDestination | Fault::LinkStalledToSource => {
                thread::sleep(LONG);
                self.link.heal();
            }
            Fault::LinkCut => {
                thread::sleep(SHORT);
                self.link.heal();
            }
            _ => {}
        }
    }

    fn becomes(mut self, cell: Cell) {
        let ended = self.migrating.take().map(Process::wait);
        if let (Some(ended), Some(codes)) = (&ended, cell.codes()) {
            assert!(ended.code.is_some_and(|code| codes.contains(&code)), "{ended:#?}");
        }
        let code = ended.and_then(|ended| ended.code);
        if let Some(cancelled) = self.cancelled {
            assert_eq!(
                cancelled,
                matches!(cell, Cell::Stays(_)),
                "the answer to a cancel says whether it was heeded"
            );
        }
        match cell {
            Cell::Never(_) => {}
            Cell::Stays(_) | Cell::NotMoved => self.stays(),
            Cell::Either if code == Some(10) => self.stays(),
            Cell::Moves | Cell::DoubtThenMoves | Cell::Either => self.moves(),
            Cell::DoubtThenStays => self.stays_after_doubt(code == Some(12)),
            Cell::Lost => self.lost(),
            Cell::Held => self.held(),
            Cell::RanThere => self.ran_there(),
        }
    }

    fn stays(self) {
        runs_on(&self.source, "tern");
        self.source.checks_clean("tern");
        self.watch.saw_no_two();
        if self.fault == Fault::SourceJournalFails {
            Host::allow_writes(&self.running);
        }
        drop((self.destination, self.receiving));
        moves_away_from(&self.source, self.running, "tern", &[WHOLE]);
    }

    fn moves(self) {
        if self.fault == Fault::SourceKilled {
            // The source's process is gone; its journal and the destination still settle the handover.
            let recovered = self.source.start(["recover", "tern", "--json"]).wait().expect_code(0);
            assert!(recovered.stdout.contains("runs at"), "{recovered:#?}");
        } else {
            self.running.wait().expect_code(0);
        }
        assert!(!self.source.socket("tern").exists() || self.fault == Fault::SourceKilled);
        runs_on(&self.destination, "tern");
        self.destination.checks_clean("tern");
        self.watch.saw_no_two();
    }

    fn stays_after_doubt(mut self, in_doubt: bool) {
        if in_doubt {
            assert_ne!(self.source.phase("tern").as_deref(), Some("running"), "nobody knows yet");
        }
        self.receiving = restarted(&self.destination, self.receiving, &self.link);
        wait_until("the guest runs on", || self.source.phase("tern").as_deref() == Some("running"));
        runs_on(&self.source, "tern");
        self.source.checks_clean("tern");
        self.watch.saw_no_two();
        moves_away_from(&self.source, self.running, "tern", &[WHOLE]);
    }

    fn lost(self) {
        if self.fault == Fault::SourceKilled && self.stage != Stage::Hello {
            self.receiving.process.says("a guest did not arrive");
        }
        assert_ne!(self.destination.phase("tern").as_deref(), Some("running"));
        let recovered = self.source.start(["recover", "tern"]).wait();
        assert!(matches!(recovered.code, Some(11..=13)), "neither here nor there: {recovered:#?}");
        self.watch.saw_no_two();
    }

    fn held(self) {
        assert_ne!(self.destination.phase("tern").as_deref(), Some("running"));
        let run = ["recover", "tern", "--run-destination"];
        self.destination.start(run).wait().expect_code(2);
        assert_ne!(self.destination.phase("tern").as_deref(), Some("running"));
        self.destination.start(run.iter().chain(&["--other-host-is-fenced"])).wait().expect_code(0);
        self.receiving.process.event("arrived");
        runs_on(&self.destination, "tern");
        self.destination.checks_clean("tern");
        self.watch.saw_no_two();
    }

    fn ran_there(mut self) {
        self.receiving = restarted(&self.destination, self.receiving, &self.link);
        if self.fault == Fault::BothKilled {
            let recovered = self.source.start(["recover", "tern"]).wait();
            assert_ne!(recovered.code, Some(10), "it may have run there: {recovered:#?}");
        } else {
            // The source's memory is old: the guest at the destination may have written to disks and sent
            // packets.
            self.running.wait();
        }
        assert_ne!(self.source.phase("tern").as_deref(), Some("running"));
        self.watch.saw_no_two();
    }
}

impl Stage {
    /// The message that does not get through before the fault.
    fn stops_at(self, fault: Fault) -> Option<&'static str> {
        Some(match self {
            Self::Hello => "Hello",
            Self::Ready => "Ready",
            Self::Rounds => match fault {
                Fault::MessageCorrupt
                | Fault::MessageOversized
                | Fault::MessageUnknown
                | Fault::MessageRepeated => "RoundClosed",
                _ => return None,
            },
            Self::Final if fault == Fault::LoadFails => "State",
            Self::Final => "Final",
            Self::Prepared => "Prepared",
            Self::Go => "Go",
            Self::Running => "Running",
            Self::After => return None,
        })
    }
}

fn how(stage: Stage, fault: Fault) -> Vec<&'static str> {
    let mut how = vec!["--transport=tcp"];
    match (stage, fault) {
        (Stage::Rounds, Fault::TimedOut) => {
            how.extend(["--timeout=1", "--bandwidth-limit=1", "--if-stuck=throttle"]);
        }
        (Stage::Rounds, Fault::SlowLink) => how.extend(["--timeout=3", "--downtime-limit=150"]),
        (
            Stage::Rounds,
            Fault::GoReplayed
            | Fault::SourceJournalFails
            | Fault::DestinationJournalFails
            | Fault::MessageRepeated,
        ) => {}
        (Stage::Rounds, _) => how.extend(ENDLESS),
        _ => {}
    }
    if !(stage == Stage::Rounds && how.len() > 1) {
        how.extend(["--downtime-limit=2000", "--if-stuck=stop"]);
    }
    if fault == Fault::DigestMismatch {
        how.push(WHOLE);
    }
    how
}

/// The destination's host restarts, with its journals.
fn restarted(destination: &Host, receiving: Receiving, link: &Tap) -> Receiving {
    drop(receiving);
    let receiving = destination.receive(&[]);
    link.lead_to(receiving.address);
    link.heal();
    receiving
}

/// Checks both hosts all the time.
struct Watch {
    over: Arc<AtomicBool>,
    two: JoinHandle<bool>,
}

impl Watch {
    fn over(source: &Host, destination: &Host) -> Self {
        let (source, destination) = (source.socket("tern"), destination.socket("tern"));
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let two = thread::spawn(move || {
            let runs = |socket: &Path| Host::phase_at(socket).is_some_and(|phase| phase == "running");
            while !ends.load(Ordering::Relaxed) {
                // In this order: once the guest has run at the destination, it never runs at the source
                // again.
                if runs(&destination) && runs(&source) {
                    return true;
                }
                thread::sleep(Duration::from_millis(10));
            }
            false
        });
        Self { over, two }
    }

    fn saw_no_two(self) {
        self.over.store(true, Ordering::Relaxed);
        assert!(!self.two.join().expect("looking does not panic"), "the guest ran on both hosts");
    }
}

impl Cell {
    /// The exit codes of `migrate` that are true for the outcome.
    fn codes(self) -> Option<&'static [i32]> {
        Some(match self {
            Self::Never(_) => return None,
            Self::Stays(11) => &[11],
            Self::Stays(130) => &[130],
            Self::Stays(143) => &[143],
            Self::Stays(_) => &[10],
            Self::NotMoved => &[10, 11],
            Self::Either => &[10, 0, 12],
            Self::Moves => &[0],
            Self::DoubtThenMoves => &[0, 12],
            Self::DoubtThenStays => &[10, 12],
            // The command cannot know what the holder was doing when it ended; the holder's journal does.
            Self::Lost | Self::Held => &[12, 13],
            Self::RanThere => &[0, 12, 13],
        })
    }
}

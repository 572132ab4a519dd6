//! A model of two hosts: the real state machines of a handover, and a minimal world of what they act on. The
//! world has a guest, RAM that is old or complete, remote access, a journal, crashes. The model checker takes
//! every path through it, the simulator many.
//!
//! A crash always loses the machine, never the journal, and loses the guest only with its host. A host does
//! one thing at a time: it finishes an action of its machine before it receives the next message, but a crash
//! may come first.

#![allow(dead_code, reason = "each test program uses its own part of this")]

mod hosts;

use sterna::handover::{
    DestinationAction, DestinationEvent, DestinationHandover, DestinationState, GuestHere, RecordKind,
    SourceAction, SourceEvent, SourceHandover, SourceState,
};
use sterna::wire::AttemptId;

pub(crate) use hosts::{Destination, GuestThere, Journal, Ram, Source};

/// A number for an attempt; the machines see an [`AttemptId`] made from it.
pub(crate) type Attempt = u8;

/// A message in flight. Letters are lost, late, repeated and out of order. The link keeps the order of one
/// attempt's pages and FINAL only, which is the lanes' concern and not the handover's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Letter {
    pub(crate) attempt: Attempt,
    pub(crate) says: Says,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Says {
    /// A remote write of a page from an early round.
    WriteOld,
    /// A remote write of the page as it is since the pause.
    WriteLast,
    Final,
    Go,
    Ask,
    /// The source has given up.
    Abort,
    Prepared,
    Running,
    Refused,
}

impl Letter {
    pub(crate) fn is_to_source(self) -> bool {
        matches!(self.says, Says::Prepared | Says::Running | Says::Refused)
    }
}

/// A faulty driver or protocol: the checker must find the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    GoBeforeCommitted,
    ResumeOnLostRunning,
    VerifyBeforeRevoke,
    /// A destination that answers "ready" to a question while an operator's word is pending gets GO all the
    /// same.
    GoWhileWordPending,
    /// A guest runs on although neither COMMITTED nor REFUSED could be recorded.
    ResumeUnrecorded,
}

/// The outcome of an action, such as a write to a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Good,
    /// It fails: nothing was written, loaded or started.
    Bad,
    /// It fails, and is in the journal all the same.
    BadButWritten,
}

/// The extent of a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Crash {
    /// The host, with its guest.
    Host,
    /// Only the process that migrates; the VMM and the guest live on.
    Process,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) mutant: Option<Mutant>,
    /// An operator said that a host is fenced, and it was not: the guest may run twice if that host stays
    /// silent.
    pub(crate) lied: bool,
    /// GO was sent, or the destination gave a sign of life, since the operator gave the word that is pending.
    contradicted: bool,
    /// A contradicted word was accepted all the same.
    pub(crate) took_contradicted_word: bool,
}

fn attempt_id(attempt: Attempt) -> AttemptId {
    AttemptId([attempt; 16])
}

impl World {
    pub(crate) fn new(mutant: Option<Mutant>) -> Self {
        let source = Source {
            is_up: true,
            machine: None,
            attempt: 0,
            guest: GuestHere::Running,
            journal: Journal::default(),
            to_do: None,
        };
        let destination = Destination {
            is_up: true,
            machine: None,
            attempt: 0,
            guest: GuestThere::None,
            ram: Ram::Empty,
            compared: false,
            open_to: None,
            journal: Journal::default(),
            to_do: None,
            has_run: false,
            lost_guest: false,
            written_while_running: false,
            old_image_ran: false,
        };
        let (lied, contradicted, took_contradicted_word) = (false, false, false);
        Self { source, destination, mutant, lied, contradicted, took_contradicted_word }
    }

    // Invariants.

    /// Includes running one after the other: the guest at the destination has written to disks and sent
    /// packets, and the source's memory lacks all these effects. Only an operator's false word may cause it,
    /// if the host in question is silent.
    pub(crate) fn both_run(&self) -> bool {
        !self.lied && self.source.guest == GuestHere::Running && self.destination.has_run
    }

    /// If a guest runs on at the source, no crash may let the destination revive it: REFUSED must be on a
    /// disk.
    pub(crate) fn runs_on_unrecorded(&self) -> bool {
        match self.source.journal.last() {
            Some((attempt, RecordKind::Committed)) => {
                self.source.guest == GuestHere::Running
                    && !self.destination.journal.says(attempt, RecordKind::Refused)
            }
            _ => false,
        }
    }

    /// Whether the journals contain what this letter promises.
    pub(crate) fn is_recorded(&self, letter: Letter) -> bool {
        let (here, there) = (&self.source.journal, &self.destination.journal);
        let attempt = letter.attempt;
        match letter.says {
            Says::Go => here.says(attempt, RecordKind::Committed),
            Says::Prepared => there.says(attempt, RecordKind::Prepared),
            Says::Running => there.says(attempt, RecordKind::Running),
            // Before PREPARED the source does not depend on the destination's record.
            Says::Refused => {
                !here.says(attempt, RecordKind::Committed) || there.says(attempt, RecordKind::Refused)
            }
            _ => true,
        }
    }

    pub(crate) fn runs_incomplete(&self) -> bool {
        let there = &self.destination;
        there.guest == GuestThere::Running && (there.ram != Ram::Complete || !there.compared)
    }

    pub(crate) fn is_open_while_running(&self) -> bool {
        let there = &self.destination;
        there.guest == GuestThere::Running && (there.open_to.is_some() || there.written_while_running)
    }

    /// A guest that stands still or ran in vain counts as lost only with a host that owned it.
    pub(crate) fn one_runs_or_is_lost_with_its_host(&self) -> bool {
        let here = self.source.guest == GuestHere::Running;
        let there = self.destination.guest == GuestThere::Running;
        let lost = self.source.guest == GuestHere::Gone || self.destination.lost_guest;
        (here != there) || (!here && !there && lost)
    }

    pub(crate) fn is_settled(&self) -> bool {
        let here = self.source.machine.as_ref().map(SourceHandover::state);
        let there = self.destination.machine.as_ref().map(DestinationHandover::state);
        matches!(here, None | Some(SourceState::Kept | SourceState::Released))
            && matches!(there, None | Some(DestinationState::Refused | DestinationState::Running))
            && self.is_idle()
    }

    pub(crate) fn is_idle(&self) -> bool {
        let (here, there) = (&self.source, &self.destination);
        here.is_up && there.is_up && here.to_do.is_none() && there.to_do.is_none()
    }

    // Events.

    /// Whether an attempt may begin: the guest runs at the source, and the destination is free.
    pub(crate) fn may_begin(&self) -> bool {
        let (here, there) = (&self.source, &self.destination);
        let ended =
            matches!(here.machine.as_ref().map(SourceHandover::state), None | Some(SourceState::Kept));
        let free = matches!(
            there.machine.as_ref().map(DestinationHandover::state),
            None | Some(DestinationState::Refused)
        );
        self.is_idle() && here.guest == GuestHere::Running && ended && free
    }

    /// Connections are made, the destination's RAM is fresh and open, and the first round is in flight.
    pub(crate) fn begin(&mut self) -> Vec<Letter> {
        let attempt = self.source.attempt.max(self.destination.attempt) + 1;
        // The journal is opened anew. A COMMITTED in it is from a write that failed and was recorded all the
        // same: the guest runs.
        self.source.journal.unsure = false;
        if let Some((last, RecordKind::Committed)) = self.source.journal.last() {
            self.source.journal.write(last, RecordKind::Refused, Outcome::Good);
        }
        let (here, there) = (&mut self.source, &mut self.destination);
        (here.attempt, here.machine) = (attempt, Some(SourceHandover::new(attempt_id(attempt))));
        (there.attempt, there.machine) = (attempt, Some(DestinationHandover::new(attempt_id(attempt))));
        (there.ram, there.compared, there.open_to) = (Ram::Empty, false, Some(attempt));
        vec![Letter { attempt, says: Says::WriteOld }]
    }

    pub(crate) fn may_switch(&self) -> bool {
        self.source.hears() && self.source.state() == Some(SourceState::Running)
    }

    /// Pauses the guest; sends the last pages and FINAL.
    pub(crate) fn switch(&mut self) -> Vec<Letter> {
        let here = &mut self.source;
        here.on(SourceEvent::Pausing);
        here.guest = GuestHere::Paused;
        here.on(SourceEvent::FinalSent);
        [Says::WriteLast, Says::Final].map(|says| Letter { attempt: here.attempt, says }).into()
    }

    /// The patience of the source or of its operator ends.
    pub(crate) fn source_fails(&mut self) {
        let here = &mut self.source;
        let in_doubt = matches!(here.state(), Some(SourceState::AwaitingRunning | SourceState::InDoubt));
        if in_doubt && self.mutant == Some(Mutant::ResumeOnLostRunning) && here.guest == GuestHere::Paused {
            here.guest = GuestHere::Running;
            self.destination.old_image_ran |= self.destination.has_run;
        }
        let word = here.state() == Some(SourceState::WordPending);
        here.on(SourceEvent::Failed);
        if word {
            self.took_contradicted_word |= self.contradicted;
            // If the guest ran at the destination, the operator has written that off.
            self.destination.has_run &= self.lied;
        }
    }

    /// The patience of the destination or of its operator ends.
    pub(crate) fn destination_fails(&mut self) {
        self.destination.on(DestinationEvent::Failed);
    }

    /// An operator may say that the other host is off, whether or not it is.
    pub(crate) fn may_fence_destination(&self) -> bool {
        self.source.hears() && self.source.state() == Some(SourceState::InDoubt)
    }

    pub(crate) fn is_destination_off(&self) -> bool {
        !self.destination.is_up && self.destination.guest == GuestThere::None
    }

    /// The driver begins to check the word: it asks the destination and waits out its silence.
    pub(crate) fn fence_destination(&mut self) {
        self.lied |= !self.is_destination_off();
        self.contradicted = false;
        self.source.on(SourceEvent::Fenced);
    }

    pub(crate) fn may_fence_source(&self) -> bool {
        self.destination.hears() && self.destination.state() == Some(DestinationState::Prepared)
    }

    pub(crate) fn is_source_off(&self) -> bool {
        !self.source.is_up && self.source.guest == GuestHere::Gone
    }

    pub(crate) fn fence_source(&mut self) {
        self.lied |= !self.is_source_off();
        self.destination.on(DestinationEvent::Fenced);
    }

    pub(crate) fn crash_source(&mut self, crash: Crash) {
        let here = &mut self.source;
        (here.is_up, here.machine, here.to_do) = (false, None, None);
        if crash == Crash::Host {
            here.guest = GuestHere::Gone;
        }
    }

    pub(crate) fn restart_source(&mut self) {
        let here = &mut self.source;
        here.is_up = true;
        here.journal.unsure = false;
        match here.journal.last() {
            Some((attempt, last)) => {
                here.attempt = here.attempt.max(attempt);
                let (machine, action) = SourceHandover::recover(attempt_id(attempt), last, here.guest)
                    .expect("a source's journal");
                (here.machine, here.to_do) = (Some(machine), Some(action));
            }
            // A guest that was paused before anything was promised.
            None => here.to_do = Some(SourceAction::Resume),
        }
    }

    pub(crate) fn crash_destination(&mut self) {
        let there = &mut self.destination;
        there.lost_guest |= there.guest == GuestThere::Running
            || there.journal.last().is_some_and(|(_, mark)| mark == RecordKind::Running);
        (there.is_up, there.machine, there.to_do) = (false, None, None);
        (there.guest, there.open_to, there.ram, there.compared) = (GuestThere::None, None, Ram::Empty, false);
    }

    pub(crate) fn restart_destination(&mut self) {
        let there = &mut self.destination;
        there.is_up = true;
        there.journal.unsure = false;
        if let Some((attempt, last)) = there.journal.last() {
            let (machine, action) =
                DestinationHandover::recover(attempt_id(attempt), last).expect("a destination's journal");
            (there.machine, there.to_do) = (Some(machine), Some(action));
        }
    }

    /// A letter arrives. The machine's action is carried out next.
    pub(crate) fn deliver(&mut self, letter: Letter) -> Vec<Letter> {
        let of = attempt_id(letter.attempt);
        if letter.is_to_source() && letter.attempt == self.source.attempt {
            self.contradicted = true;
            let pending = self.source.state() == Some(SourceState::WordPending);
            if pending && letter.says == Says::Prepared && self.mutant == Some(Mutant::GoWhileWordPending) {
                return vec![Letter { says: Says::Go, ..letter }];
            }
        }
        match letter.says {
            Says::WriteOld => self.destination.written(letter.attempt, Ram::Old),
            Says::WriteLast => self.destination.written(letter.attempt, Ram::Complete),
            Says::Final => self.destination.on(DestinationEvent::Final(of)),
            Says::Go => self.destination.on(DestinationEvent::Go(of)),
            Says::Ask => self.destination.on(DestinationEvent::Asked(of)),
            Says::Abort if self.destination.attempt == letter.attempt => {
                self.destination.on(DestinationEvent::Failed);
            }
            Says::Abort => {}
            Says::Prepared => self.source.on(SourceEvent::Prepared(of)),
            Says::Running => self.source.on(SourceEvent::Running(of)),
            Says::Refused => self.source.on(SourceEvent::Refused(of)),
        }
        let commits = self.source.to_do == Some(SourceAction::Record(RecordKind::Committed));
        if commits && letter.says == Says::Prepared && self.mutant == Some(Mutant::GoBeforeCommitted) {
            return vec![Letter { says: Says::Go, ..letter }];
        }
        Vec::new()
    }

    /// The network card takes a write whether or not any process reads messages.
    pub(crate) fn can_take(&self, letter: Letter) -> bool {
        match letter.says {
            Says::WriteOld | Says::WriteLast => self.destination.open_to == Some(letter.attempt),
            _ if letter.is_to_source() => self.source.hears(),
            _ => self.destination.hears(),
        }
    }

    /// The possible outcomes of the source's next action.
    pub(crate) fn source_outcomes(&self) -> &'static [Outcome] {
        match self.source.to_do {
            Some(SourceAction::Record(_)) => &[Outcome::Good, Outcome::Bad, Outcome::BadButWritten],
            Some(_) => &[Outcome::Good],
            None => &[],
        }
    }

    pub(crate) fn destination_outcomes(&self) -> &'static [Outcome] {
        use DestinationAction as Do;
        match self.destination.to_do {
            Some(Do::Record(_)) => &[Outcome::Good, Outcome::Bad, Outcome::BadButWritten],
            Some(Do::Load | Do::Run) => &[Outcome::Good, Outcome::Bad],
            Some(_) => &[Outcome::Good],
            None => &[],
        }
    }

    /// Carries out the source's next action.
    pub(crate) fn source_does(&mut self, outcome: Outcome) -> Vec<Letter> {
        let here = &mut self.source;
        let Some(action) = here.to_do.take() else { return Vec::new() };
        let letter = |says| vec![Letter { attempt: here.attempt, says }];
        match action {
            SourceAction::SendFinal | SourceAction::AwaitPrepared => Vec::new(),
            SourceAction::Record(mark) => {
                let attempt = here.attempt;
                here.journal.write(attempt, mark, outcome);
                let withdraws = here.state() == Some(SourceState::Withdrawing) && outcome != Outcome::Good;
                if withdraws && self.mutant == Some(Mutant::ResumeUnrecorded) {
                    here.guest = GuestHere::Running;
                }
                here.on(match outcome {
                    Outcome::Good => SourceEvent::Recorded(mark),
                    Outcome::Bad | Outcome::BadButWritten => SourceEvent::NotRecorded(mark),
                });
                Vec::new()
            }
            SourceAction::SendGo => letter(Says::Go),
            SourceAction::Resume => {
                let sent = letter(Says::Abort);
                if here.guest == GuestHere::Paused {
                    here.guest = GuestHere::Running;
                    self.destination.old_image_ran |= self.destination.has_run;
                }
                sent
            }
            SourceAction::Release => {
                // Destroyed, which is not the same as lost.
                if here.guest != GuestHere::Gone {
                    here.guest = GuestHere::Paused;
                }
                Vec::new()
            }
            SourceAction::Ask | SourceAction::AskOnly => letter(Says::Ask),
            SourceAction::Withdraw => letter(Says::Abort),
        }
    }

    /// Carries out the destination's next action.
    pub(crate) fn destination_does(&mut self, outcome: Outcome) -> Vec<Letter> {
        use {DestinationAction as Do, DestinationEvent as E};
        let verifies_early = self.mutant == Some(Mutant::VerifyBeforeRevoke);
        let there = &mut self.destination;
        let Some(action) = there.to_do.take() else { return Vec::new() };
        let attempt = there.attempt;
        let letter = |says| vec![Letter { attempt, says }];
        match action {
            Do::Continue => {}
            Do::Revoke => {
                if verifies_early {
                    there.compared = there.ram == Ram::Complete;
                } else {
                    there.open_to = None;
                }
                there.on(E::Revoked);
            }
            Do::Load => {
                there.open_to = None;
                there.compared |= !verifies_early && there.ram == Ram::Complete;
                if there.compared && outcome == Outcome::Good {
                    there.guest = GuestThere::Loaded;
                    there.on(E::Loaded);
                } else {
                    there.on(E::Failed);
                }
            }
            Do::Record(mark) => {
                there.journal.write(attempt, mark, outcome);
                there.on(match outcome {
                    Outcome::Good => E::Recorded(mark),
                    Outcome::Bad | Outcome::BadButWritten => E::NotRecorded(mark),
                });
            }
            Do::SendPrepared => return letter(Says::Prepared),
            Do::Run if outcome == Outcome::Good => {
                assert_eq!(there.guest, GuestThere::Loaded, "a guest is started once");
                (there.guest, there.has_run) = (GuestThere::Running, true);
                there.on(E::Started);
            }
            Do::Run => there.on(E::NotStarted),
            Do::SendRunning => return letter(Says::Running),
            Do::Refuse => {
                there.discard();
                return letter(Says::Refused);
            }
            Do::Discard => there.discard(),
        }
        Vec::new()
    }

    /// From now on nothing fails and no letter is lost. The hosts restart, all actions are carried out, all
    /// letters arrive, and a host that waits in vain gives up; the destination last, because it has the
    /// longest patience.
    pub(crate) fn heal(&mut self) {
        for _ in 0..100 {
            let letters = if !self.source.is_up {
                self.restart_source();
                continue;
            } else if !self.destination.is_up {
                self.restart_destination();
                continue;
            } else if self.source.to_do.is_some() {
                self.source_does(Outcome::Good)
            } else if self.destination.to_do.is_some() {
                self.destination_does(Outcome::Good)
            } else if !matches!(self.source.state(), None | Some(SourceState::Kept | SourceState::Released)) {
                self.source_fails();
                continue;
            } else if !self.is_settled() {
                self.destination_fails();
                continue;
            } else {
                return;
            };
            for letter in letters {
                self.settle_letters(letter);
            }
        }
    }

    fn settle_letters(&mut self, letter: Letter) {
        // A busy host finishes its actions first.
        let mut sent = Vec::new();
        while letter.is_to_source() && self.source.to_do.is_some() {
            sent.extend(self.source_does(Outcome::Good));
        }
        while !letter.is_to_source() && self.destination.to_do.is_some() {
            sent.extend(self.destination_does(Outcome::Good));
        }
        if self.can_take(letter) {
            sent.extend(self.deliver(letter));
        }
        sent.into_iter().for_each(|letter| self.settle_letters(letter));
    }
}

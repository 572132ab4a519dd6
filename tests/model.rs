//! Every path that a handover can take, by model checking: two attempts, with letters lost, repeated, late
//! and out of order, a journal that fails, and hosts that crash at any step.
//!
//! A letter stays in the network for ever once it is sent, so it may arrive at any later time, any number of
//! times, or never.

mod protocol;

use std::collections::BTreeSet;

use protocol::{Crash, GuestThere, Letter, Mutant, Outcome, World};
use stateright::{Checker, Model, Property};
use sterna::handover::{DestinationState, GuestHere, RecordKind, SourceState};

/// The limits on the faults of one path.
struct Handover {
    mutant: Option<Mutant>,
    attempts: u8,
    crashes: u8,
    failures: u8,
    words: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    network: BTreeSet<Letter>,
    crashes: u8,
    failures: u8,
    words: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin,
    Switch,
    Deliver(Letter),
    SourceDoes(Outcome),
    DestinationDoes(Outcome),
    SourceFails,
    DestinationFails,
    CrashSource(Crash),
    CrashDestination,
    RestartSource,
    RestartDestination,
    FenceSource,
    FenceDestination,
}

impl Model for Handover {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let (world, network) = (World::new(self.mutant), BTreeSet::new());
        vec![State { world, network, crashes: 0, failures: 0, words: 0 }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        let world = &state.world;
        let may_fail = state.failures < self.failures;
        let possible = |outcome: &&Outcome| **outcome == Outcome::Good || may_fail;
        steps.extend(
            world.source_outcomes().iter().filter(possible).map(|&outcome| Step::SourceDoes(outcome)),
        );
        steps.extend(
            world
                .destination_outcomes()
                .iter()
                .filter(possible)
                .map(|&outcome| Step::DestinationDoes(outcome)),
        );
        steps.extend(
            state
                .network
                .iter()
                .filter(|&&letter| world.can_take(letter))
                .map(|&letter| Step::Deliver(letter)),
        );
        let offered = [
            (world.may_begin() && world.source.attempt < self.attempts, Step::Begin),
            (world.may_switch(), Step::Switch),
            (world.source.hears(), Step::SourceFails),
            (world.destination.hears(), Step::DestinationFails),
            (world.may_fence_source() && state.words < self.words, Step::FenceSource),
            (world.may_fence_destination() && state.words < self.words, Step::FenceDestination),
            (!world.source.is_up, Step::RestartSource),
            (!world.destination.is_up, Step::RestartDestination),
        ];
        steps.extend(offered.into_iter().filter(|(may, _)| *may).map(|(_, step)| step));
        if state.crashes < self.crashes {
            if world.source.is_up {
                steps.extend([Step::CrashSource(Crash::Host), Step::CrashSource(Crash::Process)]);
            }
            if world.destination.is_up {
                steps.push(Step::CrashDestination);
            }
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        let world = &mut state.world;
        let sent = match step {
            Step::Begin => world.begin(),
            Step::Switch => world.switch(),
            Step::SourceDoes(outcome) => world.source_does(outcome),
            Step::DestinationDoes(outcome) => world.destination_does(outcome),
            Step::Deliver(letter) => world.deliver(letter),
            other => {
                match other {
                    Step::SourceFails => world.source_fails(),
                    Step::DestinationFails => world.destination_fails(),
                    Step::CrashSource(crash) => world.crash_source(crash),
                    Step::CrashDestination => world.crash_destination(),
                    Step::RestartSource => world.restart_source(),
                    Step::RestartDestination => world.restart_destination(),
                    Step::FenceSource => world.fence_source(),
                    _ => world.fence_destination(),
                }
                Vec::new()
            }
        };
        state.network.extend(sent);
        match step {
            Step::CrashSource(_) | Step::CrashDestination => state.crashes += 1,
            Step::FenceSource | Step::FenceDestination => state.words += 1,
            Step::SourceDoes(outcome) | Step::DestinationDoes(outcome) if outcome != Outcome::Good => {
                state.failures += 1;
            }
            _ => {}
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never both run", |_, state: &State| !state.world.both_run()),
            Property::always(
                "the old image never runs after the destination has run on",
                |_, state: &State| state.world.lied || !state.world.destination.old_image_ran,
            ),
            Property::sometimes(
                "COMMITTED is the last record, and the guest runs on because the destination refused",
                |_, state: &State| {
                    let here = &state.world.source;
                    here.guest == GuestHere::Running
                        && here.state() == Some(SourceState::Kept)
                        && matches!(here.journal.last(), Some((_, RecordKind::Committed)))
                },
            ),
            Property::always(
                "no guest runs on that a crash would revive at the destination",
                |_, state: &State| !state.world.runs_on_unrecorded(),
            ),
            Property::always(
                "a word is void once the destination answers, and no GO answers it",
                |_, state: &State| !state.world.took_contradicted_word,
            ),
            Property::always("what is said is in the journal", |_, state: &State| {
                state.network.iter().all(|&letter| state.world.is_recorded(letter))
            }),
            Property::always("who runs has the complete, compared image", |_, state: &State| {
                !state.world.runs_incomplete()
            }),
            Property::always("no remote write after the guest runs", |_, state: &State| {
                !state.world.is_open_while_running()
            }),
            Property::always(
                "once the link heals it is settled, and one runs or was lost with its host",
                heals,
            ),
            Property::always("a source that died after it committed leaves a guest that runs", commits),
            Property::sometimes("it runs at the destination", |_, state: &State| {
                state.world.is_settled() && state.world.destination.guest == GuestThere::Running
            }),
            Property::sometimes("a doubt ends at the source", |_, state: &State| {
                let world = &state.world;
                world.source.state() == Some(SourceState::Kept)
                    && world.source.journal.says(1, RecordKind::Committed)
                    && world.source.guest == GuestHere::Running
            }),
        ]
    }
}

/// From any state, if nothing fails any more, the handover settles.
fn heals(_: &Handover, state: &State) -> bool {
    let mut world = state.world.clone();
    if world.lied {
        return true;
    }
    world.heal();
    world.is_settled()
        && world.one_runs_or_is_lost_with_its_host()
        && !world.both_run()
        && !world.runs_incomplete()
        && !world.is_open_while_running()
}

/// The journal's purpose beside safety: a destination that is still ready gets its GO from a restarted
/// source.
fn commits(_: &Handover, state: &State) -> bool {
    let mut world = state.world.clone();
    let attempt = world.destination.attempt;
    let is_ready = world.destination.state() == Some(DestinationState::Prepared);
    let is_committed = world.source.journal.last() == Some((attempt, RecordKind::Committed));
    if !is_ready || !is_committed || world.source.is_up || world.source.guest != GuestHere::Gone {
        return true;
    }
    world.heal();
    world.destination.guest == GuestThere::Running
}

#[test]
fn never_two_and_one_whenever_that_can_be_known() {
    for (attempts, crashes, failures, words) in [(2, 2, 1, 1), (1, 2, 3, 2)] {
        let model = Handover { mutant: None, attempts, crashes, failures, words };
        let checker = model.checker().spawn_bfs().join();
        println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
        checker.assert_properties();
    }
}

/// The invariants that a mutant breaks.
fn broken_by(mutant: Mutant, attempts: u8, crashes: u8, failures: u8) -> Vec<&'static str> {
    let words = u8::from(mutant == Mutant::GoWhileWordPending);
    let model = Handover { mutant: Some(mutant), attempts, crashes, failures, words };
    let checker = model.checker().spawn_bfs().join();
    let mut broken: Vec<_> = checker
        .discoveries()
        .into_keys()
        .filter(|name| !["a doubt", "it runs", "COMMITTED"].iter().any(|&start| name.starts_with(start)))
        .collect();
    broken.sort_unstable();
    broken
}

#[test]
fn go_before_committed_is_durable_is_found() {
    // The write fails after GO was sent, and the source takes its guest back.
    assert!(broken_by(Mutant::GoBeforeCommitted, 1, 0, 1).contains(&"never both run"));
    // Or its process dies before the write, and leaves no trace of GO.
    assert!(broken_by(Mutant::GoBeforeCommitted, 1, 1, 0).contains(&"never both run"));
}

#[test]
fn a_source_that_resumes_when_running_is_lost_is_found() {
    assert!(broken_by(Mutant::ResumeOnLostRunning, 1, 0, 0).contains(&"never both run"));
    let old_image = "the old image never runs after the destination has run on";
    assert!(broken_by(Mutant::ResumeOnLostRunning, 1, 0, 0).contains(&old_image));
}

#[test]
fn go_while_an_operators_word_is_pending_is_found() {
    let word = "a word is void once the destination answers, and no GO answers it";
    assert!(broken_by(Mutant::GoWhileWordPending, 1, 0, 0).contains(&word));
}

#[test]
fn a_source_that_resumes_without_a_record_after_an_unsure_commit_is_found() {
    let revived = "no guest runs on that a crash would revive at the destination";
    assert!(broken_by(Mutant::ResumeUnrecorded, 1, 0, 2).contains(&revived));
}

#[test]
fn a_destination_that_compares_before_it_revokes_is_found() {
    assert!(
        broken_by(Mutant::VerifyBeforeRevoke, 1, 0, 0).contains(&"who runs has the complete, compared image")
    );
}

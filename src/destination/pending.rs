use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::lock::{Lock, LockError};
use crate::poison::IgnorePoison;

/// The operator's handle on an arriving guest: from outside the receiver it shows the guest's phase and takes
/// the operator's word.
#[derive(Clone, Debug, Default)]
pub struct PendingArrival(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    phase: ArrivalPhase,
    lock: Option<Lock>,
    word: Word,
}

/// The phase of an arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArrivalPhase {
    /// No guest is ready: it runs at its source, if one is on its way.
    #[default]
    Incoming,
    /// The guest is ready to run and paused at both ends, and its source decides.
    Ready,
    /// The same, but the source is lost: the guest is kept for a time.
    Kept {
        /// When the guest is given up.
        until: Instant,
    },
    /// RUNNING is recorded: the guest belongs to this host.
    Running,
}

/// The operator's word that the source is fenced.
#[derive(Debug, Default, PartialEq, Eq)]
enum Word {
    #[default]
    None,
    /// Given, and not decided yet.
    Given,
    Taken,
    /// The source has given a sign of life.
    Contradicted,
}

/// The outcome of an operator's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordOutcome {
    /// The word counts: the guest runs on this host.
    Taken,
    /// No guest is kept for a lost source, so a word is not needed.
    NotKept,
    /// The source gave a sign of life after the word. Its guest may run at the source.
    Contradicted,
}

impl PendingArrival {
    /// The phase of the arrival.
    #[must_use]
    pub fn phase(&self) -> ArrivalPhase {
        self.state().phase
    }

    /// The operator's word that the source's host is fenced: it is off, or can reach neither disks nor
    /// network, and will not run this guest. The guest then runs on this host, unless the source gives a sign
    /// of life; returns once that is decided. **If the word is false and the source silent, the guest runs
    /// twice.**
    ///
    /// # Errors
    /// [`LockError`] if the guest has a lock that another process holds, so the word cannot be true. Nothing
    /// changes then.
    pub fn source_is_fenced(&self) -> Result<WordOutcome, LockError> {
        let mut state = self.state();
        if !matches!(state.phase, ArrivalPhase::Kept { .. }) || state.word != Word::None {
            return Ok(WordOutcome::NotKept);
        }
        // Before the wait for GO ends, which needs this state: so the guest runs with the lock, or the lock
        // is released.
        state.lock.as_ref().map_or(Ok(()), Lock::take)?;
        state.word = Word::Given;
        self.0.changed.notify_all();
        while state.word == Word::Given {
            state = self.0.changed.wait(state).ignore_poison();
        }
        Ok(match std::mem::take(&mut state.word) {
            Word::Taken => WordOutcome::Taken,
            Word::Contradicted => WordOutcome::Contradicted,
            Word::None | Word::Given => WordOutcome::NotKept,
        })
    }

    pub(super) fn set(&self, phase: ArrivalPhase, lock: Option<Lock>) {
        let mut state = self.state();
        (state.phase, state.lock) = (phase, lock);
        if !matches!(phase, ArrivalPhase::Kept { .. }) && state.word == Word::Given {
            state.word = Word::None;
        }
        self.0.changed.notify_all();
    }

    /// Whether a word awaits its decision.
    #[cfg(test)]
    pub(super) fn is_word_given(&self) -> bool {
        self.state().word == Word::Given
    }

    /// The source gave a sign of life: a pending word is void.
    pub(super) fn contradict(&self) {
        let mut state = self.state();
        if state.word == Word::Given {
            state.word = Word::Contradicted;
            // The guest's lock was taken for the word.
            if let Some(lock) = &state.lock {
                lock.give_up();
            }
            self.0.changed.notify_all();
        }
    }

    /// Accepts a pending word, and ends the keeping.
    pub(super) fn take_word(&self) -> bool {
        let mut state = self.state();
        let given = state.word == Word::Given;
        if given {
            state.word = Word::Taken;
            self.0.changed.notify_all();
        }
        given
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().ignore_poison()
    }
}

impl ArrivalPhase {
    /// How much longer the guest is kept; `None` if its source is not lost.
    #[must_use]
    pub fn left(self) -> Option<Duration> {
        match self {
            Self::Kept { until } => Some(until.saturating_duration_since(Instant::now())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn kept() -> PendingArrival {
        let pending = PendingArrival::default();
        pending.set(ArrivalPhase::Kept { until: Instant::now() + Duration::from_secs(600) }, None);
        pending
    }

    #[test]
    fn a_word_counts_only_while_the_guest_is_kept_and_its_source_silent() {
        let none = PendingArrival::default();
        assert_eq!(none.source_is_fenced().unwrap(), WordOutcome::NotKept);
        none.set(ArrivalPhase::Ready, None);
        assert_eq!(none.source_is_fenced().unwrap(), WordOutcome::NotKept);
        type Decide = fn(&PendingArrival);
        let decisions: [(Decide, WordOutcome); 3] = [
            (|pending| assert!(pending.take_word()), WordOutcome::Taken),
            (PendingArrival::contradict, WordOutcome::Contradicted),
            (|pending| pending.set(ArrivalPhase::Incoming, None), WordOutcome::NotKept),
        ];
        for (decide, outcome) in decisions {
            let pending = kept();
            thread::scope(|scope| {
                let word = scope.spawn(|| pending.source_is_fenced().unwrap());
                while !pending.is_word_given() {
                    thread::yield_now();
                }
                decide(&pending);
                assert_eq!(word.join().unwrap(), outcome);
            });
            pending.contradict();
            assert!(!pending.take_word(), "a word counts once");
        }
    }
}

//! The progress of a migration, for any number of clients that watch it. No client can delay the migration.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sterna::progress::{Event, Observer};

use super::protocol::Answer;
use super::socket::write_line;
use crate::poison::IgnorePoison;

/// The events of one migration, for the clients that watch it.
#[derive(Debug, Default)]
pub(crate) struct Broadcast {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The latest events. A slow client misses some.
    events: VecDeque<Event>,
    /// How many events preceded these.
    forgotten: usize,
    /// The end of the migration.
    end: Option<Answer>,
    clients: usize,
}

/// How many events are kept.
const EVENTS_MAX: usize = 256;

/// How long the end of a migration waits for clients to read it, because the process may end with it.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

impl Broadcast {
    /// Adds a client.
    pub(crate) fn join(self: &Arc<Self>) -> Following {
        self.state().clients += 1;
        Following(self.clone())
    }

    /// Ends the migration for its clients. Waits briefly until they have read the answer.
    pub(crate) fn end(&self, answer: Answer) {
        let deadline = Instant::now() + FAREWELL_MAX;
        let mut state = self.state();
        state.end = Some(answer);
        self.changed.notify_all();
        while state.clients > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).ignore_poison().0;
        }
    }

    /// The answer after the first `seen` events: the next event, or the end.
    fn next(&self, seen: &mut usize) -> Answer {
        let mut state = self.state();
        loop {
            *seen = state.forgotten.max(*seen);
            if let Some(event) = state.events.get(*seen - state.forgotten) {
                *seen += 1;
                return Answer::Progress(Box::new(event.clone()));
            }
            if let Some(end) = &state.end {
                return end.clone();
            }
            state = self.changed.wait(state).ignore_poison();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }
}

/// One client's subscription.
#[derive(Debug)]
pub(crate) struct Following(Arc<Broadcast>);

impl Following {
    /// Writes past and new events to the client, until the migration has ended or the client has gone.
    pub(crate) fn follow(self, mut stream: UnixStream) {
        let mut seen = 0;
        loop {
            let answer = self.0.next(&mut seen);
            // This write waits for the client, and the migration does not wait for this thread.
            let told = write_line(&mut stream, &answer);
            if told.is_err() || !matches!(answer, Answer::Progress(_)) {
                return;
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.state().clients -= 1;
        self.0.changed.notify_all();
    }
}

impl Observer for Broadcast {
    fn event(&self, event: &Event) {
        let mut state = self.state();
        if state.events.len() == EVENTS_MAX {
            state.events.pop_front();
            state.forgotten += 1;
        }
        state.events.push_back(event.clone());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    fn throttled(percent: u8) -> Event {
        Event::Throttled { percent, write_limit_mbps: None }
    }

    fn read(stream: UnixStream) -> Vec<Answer> {
        BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    #[test]
    fn clients_that_come_late_or_never_read_get_what_there_is_and_hold_nothing_up() {
        let broadcast = Arc::new(Broadcast::default());
        thread::scope(|scope| {
            let (deaf, unread) = UnixStream::pair().unwrap();
            scope.spawn(|| broadcast.join().follow(unread));
            broadcast.event(&throttled(7));
            // More than a socket holds: this returns even if the client does not read.
            for _ in 0..100 * EVENTS_MAX {
                broadcast.event(&throttled(8));
            }
            let (late, stream) = UnixStream::pair().unwrap();
            let following = broadcast.join();
            let following = scope.spawn(|| following.follow(stream));
            let reading = thread::spawn(move || read(late));
            broadcast.event(&throttled(9));
            broadcast.end(Answer::Done);
            following.join().unwrap();
            let read = reading.join().unwrap();
            assert!(read.len() <= EVENTS_MAX + 2, "{}", read.len());
            assert!(
                read.contains(&Answer::Progress(Box::new(throttled(9))))
                    && !read.contains(&Answer::Progress(Box::new(throttled(7))))
            );
            assert_eq!(read.last(), Some(&Answer::Done));
            drop(deaf);
        });
    }
}

//! What is logged of connections that are turned away: any host on the network can make as many as it likes.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::poison::IgnorePoison;

/// Logs a bounded number of connections a minute, and how many more there were.
#[derive(Debug, Default)]
pub(super) struct TurnedAway(Mutex<Option<Minute>>);

#[derive(Clone, Copy, Debug)]
struct Minute {
    began: Instant,
    connections: u64,
}

impl TurnedAway {
    /// A connection was turned away.
    pub(super) fn log(&self, from: SocketAddr, why: &dyn Display) {
        match self.count(Instant::now()) {
            Said { this: true, before: 0 } => tracing::warn!("{from} was turned away: {why}"),
            Said { this: true, before } => {
                tracing::warn!("{from} was turned away: {why}; {before} more were in the minute before");
            }
            Said { this: false, .. } => {}
        }
    }

    fn count(&self, now: Instant) -> Said {
        let mut minute = self.0.lock().ignore_poison();
        let unsaid = minute.map_or(0, |minute| minute.connections.saturating_sub(LINES_MAX));
        match &mut *minute {
            Some(minute) if now.saturating_duration_since(minute.began) < MINUTE => {
                minute.connections += 1;
                Said { this: minute.connections <= LINES_MAX, before: 0 }
            }
            over => {
                *over = Some(Minute { began: now, connections: 1 });
                Said { this: true, before: unsaid }
            }
        }
    }
}

/// Whether a connection is logged, and how many before it were not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said {
    this: bool,
    before: u64,
}

const MINUTE: Duration = Duration::from_secs(60);

/// Enough to see which hosts connect and why they are turned away.
const LINES_MAX: u64 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_connections_is_counted_and_twenty_a_minute_are_logged() {
        let (turned_away, began) = (TurnedAway::default(), Instant::now());
        let said = (0..10_000).filter(|_| turned_away.count(began).this).count();
        assert_eq!(said, 20);
        let later = began + MINUTE;
        assert_eq!(turned_away.count(later), Said { this: true, before: 9_980 });
        assert_eq!(turned_away.count(later), Said { this: true, before: 0 });
    }
}

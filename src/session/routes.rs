//! The assignment of connections to attempts.

use std::collections::{HashMap, VecDeque};

use super::greeting::Greeting;
use crate::control::ControlChannel;
use crate::transport::LaneConnection;
use crate::wire::{AttemptId, Message, Token};

/// A source that connects again about its own guest: with a question, or with GO.
#[derive(Debug)]
pub(crate) struct Reconnect {
    pub(crate) control: ControlChannel,
    pub(crate) message: Message,
}

/// The waiting threads and attempts, and the connections kept for them.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// How many threads wait for an opening.
    pub(super) openings_wanted: usize,
    /// Sources with their openings.
    pub(super) openings: VecDeque<(ControlChannel, Message)>,
    /// Attempts that expect a reconnect. One at a time: a source has no reason for two connections at once.
    pub(super) attempts: HashMap<AttemptId, Option<Reconnect>>,
    /// Attempts that wait for connections of their lanes.
    pub(super) lanes: HashMap<Token, VecDeque<LaneConnection>>,
}

impl Routes {
    /// Keeps a connection for the attempt or the thread that waits for it; returns a source that none waits
    /// for.
    pub(super) fn keep(&mut self, greeting: Greeting) -> Option<(ControlChannel, Message)> {
        match greeting {
            Greeting::Lane(token, connection) => {
                self.keep_lane(token, connection);
                None
            }
            Greeting::Control(control, message) => self.keep_source(*control, message),
        }
    }

    fn keep_lane(&mut self, token: Token, connection: LaneConnection) {
        let from = connection.from;
        match self.lanes.get_mut(&token) {
            Some(waiting) if waiting.len() < LANES_MAX => waiting.push_back(connection),
            _ => tracing::warn!("a connection from {from} was closed: it belongs to no lane that is awaited"),
        }
    }

    fn keep_source(
        &mut self,
        control: ControlChannel,
        message: Message,
    ) -> Option<(ControlChannel, Message)> {
        match &message {
            Message::Ask(attempt_id) | Message::Go(attempt_id) => match self.attempts.get_mut(attempt_id) {
                Some(slot) => {
                    slot.get_or_insert(Reconnect { control, message });
                    None
                }
                None => Some((control, message)),
            },
            Message::Hello(_) | Message::OfferImage(_) if self.openings.len() < self.openings_wanted => {
                self.openings.push_back((control, message));
                None
            }
            _ => Some((control, message)),
        }
    }
}

/// What a destination accepts.
const LANES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn lane(token: u8, lane: u8) -> Greeting {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let from = stream.local_addr().unwrap();
        Greeting::Lane(Token([token; 16]), LaneConnection { lane, stream, from })
    }

    #[test]
    fn lanes_go_to_the_attempt_whose_token_they_bear_and_others_are_closed() {
        let mut routes = Routes::default();
        for token in [1, 2] {
            routes.lanes.insert(Token([token; 16]), VecDeque::new());
        }
        for (token, number) in [(1, 0), (2, 0), (3, 0), (2, 1), (1, 1)] {
            assert!(routes.keep(lane(token, number)).is_none());
        }
        for token in [1, 2] {
            let kept: Vec<_> = routes.lanes[&Token([token; 16])].iter().map(|kept| kept.lane).collect();
            assert_eq!(kept, [0, 1], "{token}");
        }
        assert_eq!(routes.lanes.len(), 2);
    }

    #[test]
    fn no_more_lanes_are_kept_than_an_attempt_may_have() {
        let mut routes = Routes::default();
        routes.lanes.insert(Token([1; 16]), VecDeque::new());
        for _ in 0..=LANES_MAX {
            assert!(routes.keep(lane(1, 0)).is_none());
        }
        assert_eq!(routes.lanes[&Token([1; 16])].len(), LANES_MAX);
    }
}

//! The assignment of connections to attempts.

use std::collections::{HashMap, VecDeque};

use sterna_trust::Fingerprint;

use super::greeting::Greeting;
use crate::control::{ControlChannel, Security};
use crate::transport::LaneConnection;
use crate::wire::{AttemptId, Message, Refusal, Token};

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
    /// Attempts that expect a reconnect of their source. One at a time: a source has no reason for two
    /// connections at once.
    pub(super) attempts: HashMap<AttemptId, Owned<Option<Reconnect>>>,
    /// Attempts that wait for connections of their lanes.
    pub(super) lanes: HashMap<Token, Owned<VecDeque<LaneConnection>>>,
}

/// What is kept for an attempt, and the key of the host that began the attempt: no other host takes part.
#[derive(Debug)]
pub(super) struct Owned<T> {
    pub(super) owner: Option<Fingerprint>,
    pub(super) kept: T,
}

impl<T: Default> Owned<T> {
    pub(super) fn by(owner: Option<Fingerprint>) -> Self {
        Self { owner, kept: T::default() }
    }
}

impl Routes {
    /// Keeps a connection for the attempt or the thread that waits for it; returns a source that none waits
    /// for.
    pub(super) fn keep(
        &mut self,
        greeting: Greeting,
        security: &Security,
    ) -> Option<(ControlChannel, Message)> {
        match greeting {
            Greeting::Lane(token, connection) => {
                self.keep_lane(token, connection, security);
                None
            }
            Greeting::Control(control, message) => self.keep_source(*control, message, security),
        }
    }

    fn keep_lane(&mut self, token: Token, connection: LaneConnection, security: &Security) {
        let (from, identity) = (connection.from, connection.identity);
        match self.lanes.get_mut(&token) {
            Some(Owned { owner, .. }) if !security.belongs_to(*owner, identity) => {
                tracing::warn!("a connection from {from} was closed: its attempt is another host's");
            }
            Some(Owned { kept, .. }) if kept.len() < LANES_MAX => kept.push_back(connection),
            _ => tracing::warn!("a connection from {from} was closed: it belongs to no lane that is awaited"),
        }
    }

    fn keep_source(
        &mut self,
        mut control: ControlChannel,
        message: Message,
        security: &Security,
    ) -> Option<(ControlChannel, Message)> {
        match &message {
            Message::Ask(attempt_id) | Message::Go(attempt_id) => match self.attempts.get_mut(attempt_id) {
                Some(Owned { owner, .. }) if !security.belongs_to(*owner, control.identity()) => {
                    refuse_other_host(&mut control, &message);
                    None
                }
                Some(Owned { kept, .. }) => {
                    kept.get_or_insert(Reconnect { control, message });
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

/// Tells a host that the attempt which it asks about is another's. That says nothing about the guest, so
/// it settles no doubt.
pub(super) fn refuse_other_host(control: &mut ControlChannel, message: &Message) {
    let from = control.peer_address();
    tracing::warn!("{from} sent {} for an attempt of another host and was turned away", message.name());
    let _ = control.send(&Message::Refused(Refusal::OtherHost));
}

/// What a destination accepts.
const LANES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::control::ProtectedStream;

    fn lane(token: u8, lane: u8) -> Greeting {
        lane_of(token, lane, None)
    }

    fn lane_of(token: u8, lane: u8, identity: Option<Fingerprint>) -> Greeting {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (from, stream) = (stream.local_addr().unwrap(), ProtectedStream::Plain(stream));
        Greeting::Lane(Token([token; 16]), LaneConnection { lane, stream, from, identity })
    }

    #[test]
    fn a_lane_of_another_host_is_closed_even_if_it_bears_the_token() {
        let [owner, other] = [1, 2].map(|key| Some(Fingerprint([key; 32])));
        let mut routes = Routes::default();
        routes.lanes.insert(Token([1; 16]), Owned::by(owner));
        for (number, identity) in [(0, other), (1, None), (2, owner)] {
            assert!(routes.keep(lane_of(1, number, identity), &Security::default()).is_none());
        }
        let kept: Vec<_> = routes.lanes[&Token([1; 16])].kept.iter().map(|kept| kept.lane).collect();
        assert_eq!(kept, [2]);
    }

    #[test]
    fn lanes_go_to_the_attempt_whose_token_they_bear_and_others_are_closed() {
        let mut routes = Routes::default();
        for token in [1, 2] {
            routes.lanes.insert(Token([token; 16]), Owned::by(None));
        }
        for (token, number) in [(1, 0), (2, 0), (3, 0), (2, 1), (1, 1)] {
            assert!(routes.keep(lane(token, number), &Security::default()).is_none());
        }
        for token in [1, 2] {
            let kept: Vec<_> = routes.lanes[&Token([token; 16])].kept.iter().map(|kept| kept.lane).collect();
            assert_eq!(kept, [0, 1], "{token}");
        }
        assert_eq!(routes.lanes.len(), 2);
    }

    #[test]
    fn no_more_lanes_are_kept_than_an_attempt_may_have() {
        let mut routes = Routes::default();
        routes.lanes.insert(Token([1; 16]), Owned::by(None));
        for _ in 0..=LANES_MAX {
            assert!(routes.keep(lane(1, 0), &Security::default()).is_none());
        }
        assert_eq!(routes.lanes[&Token([1; 16])].kept.len(), LANES_MAX);
    }
}

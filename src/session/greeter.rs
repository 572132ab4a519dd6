//! Greets connections, each in a thread of its own, and keeps them for the threads and attempts that wait.
//!
//! Any host on the network can connect, say nothing or a byte now and then. Such a connection costs a thread
//! for as long as a greeting may take, and delays no other; there are bounds for all of them together and for
//! those of one address.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use super::greeting::read_greeting;
use super::opening::HELLO_MAX;
use super::outcome::answer;
use super::routes::Routes;
use super::turned_away::TurnedAway;
use crate::control::{ControlChannel, Security};
use crate::panics::{Panicked, caught};
use crate::poison::IgnorePoison;
use crate::state::HostState;
use crate::wire::{Message, Refusal};

/// What the threads that greet and the threads that wait share.
#[derive(Debug)]
pub(super) struct Greeter {
    pub(super) state: HostState,
    security: Mutex<Security>,
    shared: Mutex<Shared>,
    /// Signalled when a connection is kept, or a thread no longer accepts.
    pub(super) changed: Condvar,
    pub(super) turned_away: TurnedAway,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Whether a thread accepts connections for all attempts.
    pub(super) is_accepting: bool,
    pub(super) routes: Routes,
    /// How many connections of each address are being greeted.
    greeted: HashMap<IpAddr, usize>,
}

impl Shared {
    /// Whether more may come than the routes have now.
    pub(super) fn is_greeting(&self) -> bool {
        !self.greeted.is_empty()
    }
}

impl Greeter {
    pub(super) fn new(state: HostState) -> Self {
        let (security, shared, changed, turned_away) = Default::default();
        Self { state, security, shared, changed, turned_away }
    }

    pub(super) fn protect_by(&self, security: Security) {
        *self.security.lock().ignore_poison() = security;
    }

    pub(super) fn security(&self) -> Security {
        self.security.lock().ignore_poison().clone()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().ignore_poison()
    }

    /// Greets a connection in a thread of its own. It is closed if too many are being greeted.
    pub(super) fn greet(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let Some(place) = Place::take(self, from.ip().to_canonical()) else {
            self.turned_away.log(from, &"too many connections are being greeted");
            return;
        };
        let greet = move || {
            let greeter = &place.0;
            if let Err(Panicked(text)) = caught(|| greeter.keep(stream, from)) {
                tracing::error!("a connection from {from} was lost: a defect of sterna: {text}");
            }
        };
        if let Err(error) = thread::Builder::new().name("greeting".into()).spawn(greet) {
            self.turned_away.log(from, &format_args!("no thread can greet it: {error}"));
        }
    }

    /// Reads the purpose of a connection, and keeps or answers it.
    fn keep(&self, stream: TcpStream, from: SocketAddr) {
        let security = self.security();
        let greeting = match read_greeting(stream, from, &security, HELLO_MAX) {
            Ok(greeting) => greeting,
            Err(error) => return self.turned_away.log(from, &error),
        };
        let stranger = self.lock().routes.keep(greeting, &security);
        self.changed.notify_all();
        if let Some((control, message)) = stranger {
            self.answer_stranger(control, &message);
        }
    }

    /// Answers questions about other attempts from the records, and refuses guests that no thread waits for
    /// as Busy.
    pub(super) fn answer_stranger(&self, mut control: ControlChannel, message: &Message) {
        match message {
            Message::Ask(attempt_id) => {
                answer((&self.state, &self.security()), &mut control, *attempt_id);
            }
            Message::Hello(_) | Message::OfferImage(_) => {
                let _ = control.send(&Message::Refused(Refusal::Busy));
            }
            other => {
                let why = format_args!("it began with {}", other.name());
                self.turned_away.log(control.peer_address(), &why);
            }
        }
    }
}

/// One of the connections that are being greeted.
struct Place(Arc<Greeter>, IpAddr);

impl Place {
    fn take(greeter: &Arc<Greeter>, address: IpAddr) -> Option<Self> {
        let greeted = &mut greeter.lock().greeted;
        let of_address = greeted.get(&address).copied().unwrap_or_default();
        if of_address >= OF_ADDRESS_MAX || greeted.values().sum::<usize>() >= GREETED_MAX {
            return None;
        }
        greeted.insert(address, of_address + 1);
        Some(Self(greeter.clone(), address))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let greeted = &mut self.0.lock().greeted;
        if let Some(count) = greeted.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                greeted.remove(&self.1);
            }
        }
    }
}

/// The most connections that are being greeted at once.
const GREETED_MAX: usize = 256;

/// The most of one address: all lanes of a source, its control channel and more.
const OF_ADDRESS_MAX: usize = 96;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn one_address_takes_no_more_than_its_share_of_places() {
        let greeter = Arc::new(Greeter::new(HostState::lost_with_this_process()));
        let address = |last| IpAddr::from([192, 0, 2, last]);
        let of = |last| (0..300).map_while(|_| Place::take(&greeter, address(last))).collect::<Vec<_>>();
        let (one, other, third) = (of(1), of(2), of(3));
        assert_eq!([one.len(), other.len(), third.len()], [96, 96, 64]);
        assert!(Place::take(&greeter, address(4)).is_none());
        drop(one);
        assert!(Place::take(&greeter, address(4)).is_some());
        drop((other, third));
        assert!(greeter.lock().greeted.is_empty());
    }

    #[test]
    fn a_connection_that_says_nothing_holds_no_caller() {
        let greeter = Arc::new(Greeter::new(HostState::lost_with_this_process()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, from) = listener.accept().unwrap();
        greeter.greet(stream, from);
        assert_eq!(greeter.lock().greeted.len(), 1, "it is being greeted while the caller goes on");
        drop(silent);
    }
}

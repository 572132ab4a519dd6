//! The link between two hosts under a test's control. It passes all messages on; the test may stop it at any
//! message, lose, change or repeat one, stall the link one way or both, or cut it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sterna::wire::{AttemptId, FRAME_HEAD_LEN, FrameHead, Message, PREAMBLE_LEN, Preamble, Protection, Role};
use zerocopy::{FromBytes, IntoBytes};

use super::PATIENCE;

/// A link. It lives as long as its connections do.
#[derive(Clone, Debug)]
pub(crate) struct Tap {
    /// The address at which it listens in place of the destination.
    pub(crate) address: SocketAddr,
    shared: Arc<(Mutex<Link>, Condvar)>,
}

/// The direction of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

/// The fate of the message at which the link was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Pass,
    PassTwice,
    Lose,
    /// It has a byte too many.
    Corrupt,
    /// Its head announces more than any message may have.
    Oversize,
    /// Its kind does not exist.
    Unknown,
    /// Only for a part of the state: it belongs to another state.
    OtherState,
}

#[derive(Debug)]
struct Link {
    destination: SocketAddr,
    /// The name of the message at which to stop.
    stop_at: Option<&'static str>,
    /// The messages seen so far, by name.
    seen: Vec<&'static str>,
    /// Whether the link is stalled, each way.
    stalled: [bool; 2],
    /// New connections are refused, and the old ones are ended.
    cut: bool,
    /// Every page's digest is that of another page.
    other_digests: bool,
    /// The link's time for each KiB.
    per_kib: Duration,
    /// The last attempt that a source began.
    attempt_id: Option<AttemptId>,
    connections: Vec<Connection>,
    /// The messages after the stop, on the stopped connection and direction; the stopping message is first.
    held: Option<Held>,
}

#[derive(Debug)]
struct Connection {
    role: Role,
    ends: [TcpStream; 2],
}

#[derive(Debug)]
struct Held {
    connection: usize,
    way: Way,
    frames: Vec<Frame>,
    /// No message follows these: the sender is gone.
    ended: bool,
    /// The test releases them, when the link moves again.
    released: Option<Then>,
}

#[derive(Clone, Debug)]
struct Frame {
    name: &'static str,
    message: Message,
    body: Vec<u8>,
}

impl Tap {
    /// A link to a destination.
    pub(crate) fn to(destination: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let link = Link {
            destination,
            stop_at: None,
            seen: Vec::new(),
            stalled: [false; 2],
            cut: false,
            other_digests: false,
            per_kib: Duration::ZERO,
            attempt_id: None,
            connections: Vec::new(),
            held: None,
        };
        let tap = Self { address, shared: Arc::new((Mutex::new(link), Condvar::new())) };
        let listening = tap.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let tap = listening.clone();
                // Ends with the connection, whichever side closes first.
                thread::spawn(move || tap.connect(stream));
            }
        });
        tap
    }

    /// The destination's new address.
    pub(crate) fn lead_to(&self, destination: SocketAddr) {
        self.lock().destination = destination;
    }

    /// Stops the first message with this name and all later ones in the same direction, except heartbeats.
    pub(crate) fn stop_at(&self, name: &'static str) {
        self.lock().stop_at = Some(name);
    }

    /// Waits until a message was stopped.
    pub(crate) fn await_stop(&self) {
        self.wait_for("the message at which to stop", |link| link.held.is_some());
    }

    /// Waits until a message with this name has passed.
    pub(crate) fn await_message(&self, name: &str) {
        self.wait_for(name, |link| link.seen.contains(&name));
    }

    /// How many messages with this name have passed.
    pub(crate) fn count(&self, name: &str) -> usize {
        self.lock().seen.iter().filter(|&&seen| seen == name).count()
    }

    /// Lets a stopped link continue.
    pub(crate) fn go_on(&self, then: Then) {
        let mut link = self.lock();
        if let Some(held) = &mut link.held {
            held.released = Some(then);
            link.flush();
        }
    }

    /// Stalls one direction: nothing is lost, and neither end learns of the stall.
    pub(crate) fn stall(&self, way: Way) {
        self.lock().stalled[way.end()] = true;
    }

    /// Ends all stalls and cuts: bytes move again, and new connections get through.
    pub(crate) fn heal(&self) {
        let mut link = self.lock();
        (link.stalled, link.cut) = ([false; 2], false);
        link.flush();
        self.shared.1.notify_all();
    }

    /// Ends every connection, and refuses new ones.
    pub(crate) fn cut(&self) {
        let mut link = self.lock();
        link.cut = true;
        link.end_connections(|_| true);
        self.shared.1.notify_all();
    }

    /// Limits each direction of each connection to this rate from now on.
    pub(crate) fn slow_down(&self, kib_per_second: u32) {
        self.lock().per_kib = Duration::from_secs(1) / kib_per_second;
    }

    /// From now on the destination receives digests of other pages.
    pub(crate) fn change_digests(&self) {
        self.lock().other_digests = true;
    }

    /// The last attempt that passed.
    pub(crate) fn attempt_id(&self) -> Option<AttemptId> {
        self.lock().attempt_id
    }

    /// Ends the control connections; the data lanes stay.
    pub(crate) fn end_control(&self) {
        self.lock().end_connections(|role| role == Role::Control);
    }

    /// Ends the data lanes; the control connections stay.
    pub(crate) fn end_lanes(&self) {
        self.lock().end_connections(|role| role != Role::Control);
    }

    fn connect(&self, source: TcpStream) -> Option<()> {
        let destination = {
            let link = self.lock();
            if link.cut {
                return None;
            }
            TcpStream::connect(link.destination).ok()?
        };
        let mut preamble = [0; PREAMBLE_LEN];
        (&source).read_exact(&mut preamble).ok()?;
        let role = Preamble::decode(preamble).ok()?.role;
        let ends = [destination, source];
        let [to_destination, to_source] = &ends;
        let (from_source, from_destination) = (clone(to_source), clone(to_destination));
        (&ends[0]).write_all(&preamble).ok()?;
        let number = {
            let mut link = self.lock();
            link.connections.push(Connection { role, ends });
            link.connections.len() - 1
        };
        let (this, other) = (self.clone(), self.clone());
        if role == Role::Control {
            thread::spawn(move || this.pass_frames(from_source, number, Way::ToDestination));
            let mut from_destination = from_destination;
            from_destination.read_exact(&mut preamble).ok()?;
            self.write(number, Way::ToSource, &preamble)?;
            other.pass_frames(from_destination, number, Way::ToSource);
        } else {
            thread::spawn(move || this.pass_bytes(from_source, number, Way::ToDestination));
            other.pass_bytes(from_destination, number, Way::ToSource);
        }
        Some(())
    }

    fn pass_bytes(&self, mut from: TcpStream, connection: usize, way: Way) {
        let mut bytes = vec![0; 256 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if self.write(connection, way, &bytes[..count]).is_none() {
                break;
            }
        }
        self.close(connection, way);
    }

    fn pass_frames(&self, mut from: TcpStream, connection: usize, way: Way) {
        while let Ok(frame) = Frame::read(&mut from) {
            if self.pass(frame, connection, way).is_none() {
                break;
            }
        }
        self.close(connection, way);
    }

    fn pass(&self, mut frame: Frame, connection: usize, way: Way) -> Option<()> {
        {
            let mut link = self.lock();
            link.seen.push(frame.name);
            match &mut frame.message {
                Message::Hello(hello) => link.attempt_id = Some(hello.attempt_id),
                Message::BlockDigests(blocks) if link.other_digests => {
                    blocks.digests.iter_mut().for_each(|block| block.digest[0] ^= 1);
                    frame = Frame::of(frame.message);
                }
                _ => {}
            }
            self.shared.1.notify_all();
            let beats = frame.name == "Beat";
            if link.stop_at == Some(frame.name) {
                link.stop_at = None;
                link.held = Some(Held { connection, way, frames: vec![frame], ended: false, released: None });
                return Some(());
            }
            if let Some(held) = &mut link.held
                && (held.connection, held.way) == (connection, way)
                && !beats
            {
                held.frames.push(frame);
                return Some(());
            }
        }
        self.write(connection, way, &frame.bytes())
    }

    /// Writes once the link allows it.
    fn write(&self, connection: usize, way: Way, bytes: &[u8]) -> Option<()> {
        let mut link = self.lock();
        while link.stalled[way.end()] && !link.cut {
            link = self.shared.1.wait(link).unwrap_or_else(PoisonError::into_inner);
        }
        let mut to = clone(&link.connections[connection].ends[way.end()]);
        let per_kib = link.per_kib;
        drop(link);
        thread::sleep(per_kib * u32::try_from(bytes.len() >> 10).expect("a bounded length"));
        to.write_all(bytes).ok()
    }

    /// Closes one end; the other learns it, as from the kernel of a live host.
    fn close(&self, connection: usize, way: Way) {
        let mut link = self.lock();
        while link.stalled[way.end()] && !link.cut {
            link = self.shared.1.wait(link).unwrap_or_else(PoisonError::into_inner);
        }
        match &mut link.held {
            Some(held) if (held.connection, held.way) == (connection, way) => held.ended = true,
            _ => {
                let _ = link.connections[connection].ends[way.end()].shutdown(Shutdown::Write);
            }
        }
    }

    fn wait_for(&self, what: &str, holds: impl Fn(&Link) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut link = self.lock();
        while !holds(&link) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "it did not come to {what}; what came: {:?}", link.seen);
            link = self
                .shared
                .1
                .wait_timeout(link, left.min(Duration::from_secs(1)))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Sends the held messages, if they are released and the link moves.
    fn flush(&mut self) {
        let Some(Held { connection, way, frames, ended, released: Some(then) }) =
            self.held.take_if(|held| held.released.is_some() && !self.stalled[held.way.end()])
        else {
            return;
        };
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            bytes.extend(if index == 0 { frame.changed(then) } else { frame.bytes() });
        }
        // An end that is gone receives nothing.
        let mut to = &self.connections[connection].ends[way.end()];
        let _ = to.write_all(&bytes);
        if ended {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    fn end_connections(&mut self, which: impl Fn(Role) -> bool) {
        for connection in self.connections.iter().filter(|connection| which(connection.role)) {
            for end in &connection.ends {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Way {
    fn end(self) -> usize {
        match self {
            Self::ToDestination => 0,
            Self::ToSource => 1,
        }
    }
}

impl Frame {
    fn read(from: &mut TcpStream) -> io::Result<Self> {
        let mut head = [0; FRAME_HEAD_LEN];
        from.read_exact(&mut head)?;
        let head = FrameHead::read_from_bytes(&head).expect("a head of its length");
        let mut body = vec![0; head.body_len.get() as usize];
        from.read_exact(&mut body)?;
        head.check(&body).expect("what sterna says arrives");
        let message = Message::decode(head.kind.get(), &body).expect("what sterna says can be read");
        Ok(Self { name: message.name(), message, body })
    }

    fn of(message: Message) -> Self {
        let body = message.encode().expect("it is as long as it was");
        Self { name: message.name(), message, body }
    }

    fn bytes(&self) -> Vec<u8> {
        self.framed(self.message.kind(), self.body.len())
    }

    fn framed(&self, kind: u16, len: usize) -> Vec<u8> {
        let mut head = FrameHead::new(kind, &self.body).expect("a bounded length");
        head.body_len = u32::try_from(len).expect("a bounded length").into();
        [head.as_bytes(), &self.body].concat()
    }

    fn changed(&self, then: Then) -> Vec<u8> {
        match then {
            Then::Pass => self.bytes(),
            Then::PassTwice => [self.bytes(), self.bytes()].concat(),
            Then::Lose => Vec::new(),
            Then::Corrupt => {
                let mut longer = self.clone();
                longer.body.push(0xa5);
                longer.bytes()
            }
            Then::Oversize => self.framed(self.message.kind(), u32::MAX as usize),
            Then::Unknown => self.framed(u16::MAX, self.body.len()),
            Then::OtherState => {
                let mut message = self.message.clone();
                let Message::State(part) = &mut message else { panic!("{} is no state", self.name) };
                part.bytes.reverse();
                Self::of(message).bytes()
            }
        }
    }
}

/// Sends GO as a stranger to the listener at `to`: of this attempt, or of one that this destination never
/// had.
pub(crate) fn say_go(to: SocketAddr, attempt_id: Option<AttemptId>) {
    let Ok(mut stream) = TcpStream::connect(to) else { return };
    let preamble = Preamble { role: Role::Control, protection: Protection::Plain }.encode();
    let go = Frame::of(Message::Go(attempt_id.unwrap_or(AttemptId([9; 16])))).bytes();
    let _ = stream.write_all(&[&preamble[..], &go].concat());
    // Ignores the answer.
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let _ = stream.read(&mut [0; 64]);
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a descriptor is left")
}

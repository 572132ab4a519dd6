//! One connection, and the thread that reads it and sends keepalives. So a peer that hangs, was stopped or
//! has lost its host is noticed whatever this side is doing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use zerocopy::{FromBytes, IntoBytes};

use super::error::ControlError;
use super::times::KEEPALIVES_MISSED_MAX;
use crate::panics::{Panicked, caught};
use crate::poison::IgnorePoison;
use crate::wire::{FRAME_HEAD_LEN, FrameHead, Message, STATE_FRAME_MAX, WireError};

/// Bytes of messages in the inbox at which the connection is no longer read.
const INBOX_BYTES_MAX: usize = 8 << 20;

/// The longest body of a frame of saved state: bytes and offset.
const STATE_BODY_MAX: usize = STATE_FRAME_MAX + size_of::<u64>();

/// Bytes counted for each message in the inbox in addition to its body.
const MESSAGE_BYTES: usize = 256;

/// A connection, the messages that arrived on it, and the lanes that end with it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    keepalive: Duration,
    /// `Err` once part of a frame was written and the rest could not be: the peer could not parse what
    /// follows.
    writing: Mutex<Result<(), ()>>,
    inbox: Mutex<Inbox>,
    /// No more messages arrive. Lanes, which check before each stripe, need not lock the inbox.
    ended: AtomicBool,
    /// Buffers for frames of saved state still to come.
    state_buffers: Mutex<Vec<Vec<u8>>>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    arrived: VecDeque<(Arrived, usize)>,
    bytes: usize,
    /// Why no more messages arrive.
    end: Option<End>,
    /// This side no longer waits for the peer.
    interrupted: bool,
    /// When the channel was dropped.
    left: Option<Instant>,
    /// Connections that are useless without this one.
    lanes: Vec<TcpStream>,
}

/// What has arrived and was not received yet.
#[derive(Debug)]
enum Arrived {
    Message(Message),
    /// A frame of saved state. The receiving thread checks its digest, while this thread reads the next
    /// frame.
    State(FrameHead, Vec<u8>),
}

impl Arrived {
    fn read(self) -> Result<Message, WireError> {
        match self {
            Self::Message(message) => Ok(message),
            Self::State(head, body) => {
                head.check(&body)?;
                Message::decode_owned(head.kind.get(), body)
            }
        }
    }
}

impl Inbox {
    fn shut_lanes(&mut self) {
        for lane in self.lanes.drain(..) {
            let _ = lane.shutdown(Shutdown::Both);
        }
    }
}

/// Why no more messages arrive from a peer.
#[derive(Clone, Debug)]
enum End {
    Closed,
    Silent(Duration),
    Broken(Option<i32>),
    Wire(WireError),
}

impl End {
    fn error(&self, awaited: &'static str) -> ControlError {
        match self {
            Self::Closed => ControlError::Closed(awaited),
            Self::Silent(silence) => ControlError::Silent { silence: *silence },
            Self::Broken(code) => ControlError::Io(
                code.map_or_else(|| io::ErrorKind::BrokenPipe.into(), io::Error::from_raw_os_error),
            ),
            Self::Wire(error) => ControlError::Wire(error.clone()),
        }
    }
}

impl Connection {
    /// Reads and sends keepalives on a connection after the exchange of preambles.
    pub(super) fn start(stream: TcpStream, keepalive: Duration) -> io::Result<Arc<Self>> {
        // A short timeout keeps keepalives punctual.
        stream.set_read_timeout(Some(keepalive / 4))?;
        stream.set_write_timeout(Some(keepalive / 20))?;
        let (inbox, ended, state_buffers, changed) = Default::default();
        let writing = Mutex::new(Ok(()));
        let connection = Arc::new(Self { stream, keepalive, writing, inbox, ended, state_buffers, changed });
        let listener = Listener { connection: connection.clone(), kept_alive: Instant::now(), unanswered: 0 };
        thread::Builder::new().name("control".into()).spawn(move || listener.run())?;
        Ok(connection)
    }

    /// Writes a frame.
    pub(super) fn send(&self, frame: &[u8], name: &'static str) -> Result<(), ControlError> {
        let mut whole = self.writing.lock().ignore_poison();
        if whole.is_err() {
            return Err(ControlError::Io(io::ErrorKind::BrokenPipe.into()));
        }
        let interrupted = self.inbox().interrupted;
        // A silent peer may recover, so the write is tried, but only briefly.
        let hurry = interrupted || self.check().is_err();
        let limit = if hurry { self.keepalive / 4 } else { self.keepalive * KEEPALIVES_MISSED_MAX };
        self.write(frame, limit, || !interrupted && self.inbox().interrupted).map_err(|error| {
            *whole = Err(());
            match error.kind() {
                io::ErrorKind::WouldBlock => ControlError::NotTaken { message: name, limit },
                io::ErrorKind::Interrupted => ControlError::Interrupted,
                _ => ControlError::Io(error),
            }
        })
    }

    /// Writes all bytes, as long as the peer takes some within each `limit` and `leave` stays false; else the
    /// error is of the kind `Interrupted`.
    fn write(&self, mut bytes: &[u8], limit: Duration, leave: impl Fn() -> bool) -> io::Result<()> {
        let mut taken = Instant::now();
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => (bytes, taken) = (&bytes[count..], Instant::now()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken.elapsed() < limit => {
                    if leave() {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes a keepalive, unless another frame is being written or the socket buffer is full: then the peer
    /// has data to read already.
    fn keepalive(&self) {
        let Ok(mut whole) = self.writing.try_lock() else { return };
        if whole.is_err() {
            return;
        }
        let Ok(frame) = FrameHead::new(Message::Beat.kind(), &[]) else { return };
        let frame = frame.as_bytes();
        // The reader reports errors of the connection.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        if let Ok(sent) = SockRef::from(&self.stream).send_with_flags(frame, flags) {
            *whole = self.write(&frame[sent..], self.keepalive, || false).map_err(drop);
        }
    }

    /// Takes the next message, waiting until `deadline`; `None` if none arrived.
    pub(super) fn receive(
        &self,
        awaited: &'static str,
        deadline: Option<Instant>,
    ) -> Result<Option<Message>, ControlError> {
        let mut inbox = self.inbox();
        loop {
            if inbox.interrupted {
                return Err(ControlError::Interrupted);
            }
            if let Some((arrived, bytes)) = inbox.arrived.pop_front() {
                inbox.bytes -= bytes;
                self.changed.notify_all();
                drop(inbox);
                return arrived.read().map(Some).map_err(|error| self.end_with(error));
            }
            if let Some(end) = &inbox.end {
                return Err(end.error(awaited));
            }
            inbox = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Ok(None),
                Some(left) => self.changed.wait_timeout(inbox, left).ignore_poison().0,
                None => self.changed.wait(inbox).ignore_poison(),
            };
        }
    }

    /// Discards all that follows a damaged or malformed message.
    fn end_with(&self, error: WireError) -> ControlError {
        let mut inbox = self.inbox();
        inbox.arrived.clear();
        inbox.bytes = 0;
        inbox.end = Some(End::Wire(error.clone()));
        inbox.shut_lanes();
        self.changed.notify_all();
        error.into()
    }

    /// Whether this side may still wait for the peer.
    pub(super) fn check_not_interrupted(&self) -> Result<(), ControlError> {
        if self.inbox().interrupted { Err(ControlError::Interrupted) } else { Ok(()) }
    }

    /// Whether the peer may still send something.
    pub(super) fn check(&self) -> Result<(), ControlError> {
        if !self.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        self.inbox().end.as_ref().map_or(Ok(()), |end| Err(end.error("the end of the transfer")))
    }

    /// How many more buffers a saved state of this length needs.
    pub(super) fn state_buffers_missing(&self, len_bytes: u64) -> u64 {
        len_bytes.div_ceil(STATE_FRAME_MAX as u64).saturating_sub(self.state_buffers().len() as u64)
    }

    /// Adds a buffer; false if no more messages will need it.
    pub(super) fn add_state_buffer(&self) -> bool {
        let is_over = {
            let inbox = self.inbox();
            inbox.end.is_some() || inbox.left.is_some()
        };
        if !is_over {
            // Not zeros, so that the pages are touched.
            let buffer = vec![1; STATE_BODY_MAX];
            self.state_buffers().push(buffer);
        }
        !is_over
    }

    fn state_buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.state_buffers.lock().ignore_poison()
    }

    /// Shuts a connection down when this one ends, so that no thread waits on it for a peer that is gone.
    pub(super) fn shut_with(&self, lane: TcpStream) {
        let mut inbox = self.inbox();
        if inbox.end.is_some() || inbox.interrupted {
            let _ = lane.shutdown(Shutdown::Both);
        } else {
            inbox.lanes.push(lane);
        }
    }

    /// Ends every wait for the peer, on this connection and on the lanes. Short messages can still be sent.
    pub(super) fn interrupt(&self) {
        let mut inbox = self.inbox();
        inbox.interrupted = true;
        inbox.shut_lanes();
        self.changed.notify_all();
    }

    /// Stops sending and receiving on this side. Data already sent still arrives.
    pub(super) fn leave(&self) {
        let mut inbox = self.inbox();
        inbox.left = Some(Instant::now());
        inbox.arrived.clear();
        inbox.lanes.clear();
        self.changed.notify_all();
        // An error means that the peer closed first.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().ignore_poison()
    }
}

/// Reads all messages, and sends keepalives in between. Silence is measured in this side's own keepalives: a
/// host that was suspended heard nothing, but sent no keepalives either.
struct Listener {
    connection: Arc<Connection>,
    kept_alive: Instant,
    /// Keepalives sent since anything arrived.
    unanswered: u32,
}

impl Listener {
    fn run(mut self) {
        // No other thread reads the connection: without this, waiting threads would wait for ever.
        let end = match caught(|| self.listen()) {
            Ok(Err(end)) => end,
            Err(Panicked(text)) => {
                tracing::error!("a connection is given up: a defect of sterna: {text}");
                End::Broken(None)
            }
        };
        let mut inbox = self.connection.inbox();
        inbox.end.get_or_insert(end);
        self.connection.ended.store(true, Ordering::Release);
        inbox.shut_lanes();
        self.connection.changed.notify_all();
    }

    fn listen(&mut self) -> Result<Infallible, End> {
        loop {
            let mut head = [0; FRAME_HEAD_LEN];
            self.fill(&mut head)?;
            let head = FrameHead::read_from_bytes(&head).map_err(|_| WireError::Malformed("frame"))?;
            let (kind, len) = (head.kind.get(), head.body_len.get() as usize);
            let max = Message::body_max(kind)?;
            if len > max {
                return Err(WireError::TooLong { what: "a message", len, max }.into());
            }
            let mut body = match kind {
                Message::STATE_KIND => self.connection.state_buffers().pop().unwrap_or_default(),
                _ => Vec::new(),
            };
            body.resize(len, 0);
            self.fill(&mut body)?;
            if kind == Message::STATE_KIND {
                self.deliver(Arrived::State(head, body), len + MESSAGE_BYTES)?;
                continue;
            }
            head.check(&body)?;
            match Message::decode(kind, &body)? {
                Message::Beat => {}
                message => self.deliver(Arrived::Message(message), len + MESSAGE_BYTES)?,
            }
        }
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), End> {
        while !buffer.is_empty() {
            match (&self.connection.stream).read(buffer) {
                Ok(0) => return Err(End::Closed),
                Ok(count) => {
                    self.unanswered = 0;
                    buffer = &mut buffer[count..];
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    // The peer closed the connection with unread data.
                    io::ErrorKind::ConnectionReset => return Err(End::Closed),
                    _ => return Err(End::Broken(error.raw_os_error())),
                },
            }
            self.tick()?;
        }
        Ok(())
    }

    /// Puts a message into the inbox once it has room.
    fn deliver(&mut self, arrived: Arrived, bytes: usize) -> Result<(), End> {
        let connection = self.connection.clone();
        let mut inbox = connection.inbox();
        while inbox.bytes > INBOX_BYTES_MAX && inbox.left.is_none() {
            inbox = connection.changed.wait_timeout(inbox, connection.keepalive / 4).ignore_poison().0;
            drop(inbox);
            // The peer is not silent: this side does not take its messages.
            self.unanswered = 0;
            self.tick()?;
            inbox = connection.inbox();
        }
        if inbox.left.is_none() && inbox.end.is_none() {
            inbox.bytes += bytes;
            inbox.arrived.push_back((arrived, bytes));
            connection.changed.notify_all();
        }
        Ok(())
    }

    /// Sends a keepalive when one is due, and ends a connection that has been silent or left for too long.
    fn tick(&mut self) -> Result<(), End> {
        if self.kept_alive.elapsed() < self.connection.keepalive {
            return Ok(());
        }
        if let Some(left) = self.connection.inbox().left {
            // Closing a connection with unread data would reset it, and lose sent data that has not arrived
            // yet.
            return if left.elapsed() < self.connection.keepalive { Ok(()) } else { Err(End::Closed) };
        }
        self.kept_alive = Instant::now();
        self.connection.keepalive();
        self.unanswered += 1;
        if self.unanswered > KEEPALIVES_MISSED_MAX {
            return Err(End::Silent(self.connection.keepalive * KEEPALIVES_MISSED_MAX));
        }
        Ok(())
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::control::KEEPALIVE_INTERVAL;
    use crate::wire::{AttemptId, DIGESTS_MAX, StateFrame};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    fn frame(message: &Message) -> Vec<u8> {
        let body = message.encode().unwrap();
        let head = FrameHead::new(message.kind(), &body).unwrap();
        [head.as_bytes(), &body].concat()
    }

    #[test]
    fn a_peer_that_says_nothing_ends_the_wait_and_the_lanes() {
        let (ours, _theirs) = pair();
        let (mut lane, _its_other_end) = pair();
        let connection = Connection::start(ours, Duration::from_millis(20)).unwrap();
        connection.shut_with(lane.try_clone().unwrap());
        assert!(matches!(connection.receive("anything", None), Err(ControlError::Silent { .. })));
        assert!(matches!(connection.check(), Err(ControlError::Silent { .. })));
        assert_eq!(lane.read(&mut [0]).unwrap(), 0, "it was shut down");
        let (mut late, _its_other_end) = pair();
        connection.shut_with(late.try_clone().unwrap());
        assert_eq!(late.read(&mut [0]).unwrap(), 0, "so is one that is made after");
        connection.leave();
    }

    #[test]
    fn two_that_have_nothing_to_say_hear_each_other_all_the_same() {
        let keepalive = Duration::from_millis(200);
        let (ours, theirs) = pair();
        let (connection, other) =
            (Connection::start(ours, keepalive).unwrap(), Connection::start(theirs, keepalive).unwrap());
        let deadline = Instant::now() + keepalive * (KEEPALIVES_MISSED_MAX + KEEPALIVES_MISSED_MAX / 2);
        assert_eq!(connection.receive("nothing", Some(deadline)).unwrap(), None);
        other.send(&frame(&Message::Go(AttemptId([1; 16]))), "Go").unwrap();
        other.leave();
        assert_eq!(connection.receive("GO", None).unwrap(), Some(Message::Go(AttemptId([1; 16]))));
        assert!(matches!(connection.receive("more", None), Err(ControlError::Closed("more"))));
        connection.leave();
    }

    #[test]
    fn an_interrupt_ends_every_wait_and_leaves_room_for_a_word() {
        let ((ours, theirs), (mut lane, _its_other_end)) = (pair(), pair());
        let (connection, other) = (
            Connection::start(ours, KEEPALIVE_INTERVAL).unwrap(),
            Connection::start(theirs, KEEPALIVE_INTERVAL).unwrap(),
        );
        connection.shut_with(lane.try_clone().unwrap());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| connection.receive("anything", None));
            connection.interrupt();
            assert!(matches!(waiting.join().unwrap(), Err(ControlError::Interrupted)));
        });
        assert_eq!(lane.read(&mut [0]).unwrap(), 0, "it was shut down");
        connection.send(&frame(&Message::Go(AttemptId([1; 16]))), "Go").unwrap();
        assert_eq!(other.receive("GO", None).unwrap(), Some(Message::Go(AttemptId([1; 16]))));
        connection.leave();
        other.leave();
    }

    #[test]
    fn an_interrupt_ends_the_sending_of_what_is_not_taken() {
        let (ours, _theirs) = pair();
        let connection = Connection::start(ours, 2 * KEEPALIVE_INTERVAL).unwrap();
        thread::scope(|scope| {
            let sending = scope.spawn(|| connection.send(&vec![0; 64 << 20], "a flood"));
            thread::sleep(Duration::from_millis(50));
            connection.interrupt();
            assert!(matches!(sending.join().unwrap(), Err(ControlError::Interrupted)));
        });
        assert!(connection.send(b"more", "more").is_err(), "nobody could tell where it begins");
        connection.leave();
    }

    #[test]
    fn after_a_part_of_the_state_that_was_damaged_nothing_is_believed() {
        let (ours, mut theirs) = pair();
        let connection = Connection::start(ours, KEEPALIVE_INTERVAL).unwrap();
        let part = |offset| frame(&Message::State(StateFrame { offset, bytes: vec![7; 9] }));
        let mut damaged = part(9);
        damaged[FRAME_HEAD_LEN + 3] ^= 1;
        theirs.write_all(&[part(0), damaged, part(18)].concat()).unwrap();
        assert!(matches!(connection.receive("state", None), Ok(Some(Message::State(_)))));
        for _ in 0..2 {
            let error = connection.receive("state", None).unwrap_err();
            assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
        }
        theirs.write_all(&frame(&Message::Go(AttemptId([1; 16])))).unwrap();
        let error = connection.receive("GO", Some(Instant::now() + KEEPALIVE_INTERVAL / 10)).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
        connection.leave();
    }

    #[test]
    fn memory_that_was_made_ready_is_what_a_state_arrives_in() {
        let ((ours, mut theirs), len) = (pair(), 3 * STATE_FRAME_MAX as u64 - 1);
        let connection = Connection::start(ours, KEEPALIVE_INTERVAL).unwrap();
        (0..connection.state_buffers_missing(len)).for_each(|_| assert!(connection.add_state_buffer()));
        assert_eq!(connection.state_buffers_missing(len), 0);
        let ready: Vec<_> = connection.state_buffers().iter().map(Vec::as_ptr).collect();
        assert_eq!(ready.len(), 3);
        for offset in 0..4 {
            let bytes = vec![7; STATE_FRAME_MAX >> offset];
            theirs.write_all(&frame(&Message::State(StateFrame { offset, bytes }))).unwrap();
            let Ok(Some(Message::State(part))) = connection.receive("state", None) else {
                panic!("no state")
            };
            assert_eq!((part.offset, part.bytes.len()), (offset, STATE_FRAME_MAX >> offset));
            assert!(part.bytes.iter().all(|&byte| byte == 7));
            assert_eq!(ready.contains(&part.bytes.as_ptr()), offset < 3);
            std::mem::forget(part);
        }
        connection.leave();
        assert!(!connection.add_state_buffer(), "nothing more comes");
    }

    #[test]
    fn a_flood_waits_in_the_connection_and_is_no_silence() {
        const DIGESTS: usize = 128;
        let (ours, mut theirs) = pair();
        let connection = Connection::start(ours, Duration::from_millis(50)).unwrap();
        let digests = frame(&Message::Digests(vec![[7; 32]; DIGESTS_MAX]));
        theirs.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let sent = (0..DIGESTS).take_while(|_| theirs.write_all(&digests).is_ok()).count();
        assert!(sent < DIGESTS, "64 MiB are more than the inbox and the buffers of a connection hold");
        let waiting = connection.inbox().bytes;
        assert!(waiting <= INBOX_BYTES_MAX + 2 * digests.len(), "{waiting}");
        assert!(connection.check().is_ok());
        for _ in 0..sent {
            assert!(matches!(connection.receive("digests", None), Ok(Some(Message::Digests(_)))));
        }
        connection.leave();
    }
}

//! One connection, and the thread that reads it and sends keepalives. So a peer that hangs, was stopped or
//! has lost its host is noticed whatever this side is doing.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::SockRef;
use sterna_trust::{TlsError, TlsSession};
use zerocopy::{FromBytes, IntoBytes};

use super::error::ControlError;
use super::protected_stream::ProtectedStream;
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

/// Bytes of TLS records that are read at once.
const RECORDS_LEN: usize = 64 << 10;

/// A connection, the messages that arrived on it, and the lanes that end with it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    /// The other side of TLS, if the connection has it. Locked only to encrypt and decrypt, never for the
    /// time of a transfer.
    tls: Option<Mutex<TlsSession>>,
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
    /// A record of TLS is not the peer's.
    Tls,
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
            Self::Tls => TlsError::Changed.into(),
            Self::Wire(error) => ControlError::Wire(error.clone()),
        }
    }
}

impl Connection {
    /// Reads and sends keepalives on a connection after its greeting.
    pub(super) fn start(stream: ProtectedStream, keepalive: Duration) -> io::Result<Arc<Self>> {
        let (stream, tls) = match stream {
            ProtectedStream::Plain(stream) => (stream, None),
            ProtectedStream::Tls(stream) => {
                let (stream, session) = stream.into_parts();
                (stream, Some(Mutex::new(session)))
            }
        };
        // A short timeout keeps keepalives punctual.
        stream.set_read_timeout(Some(keepalive / 4))?;
        stream.set_write_timeout(Some(keepalive / 20))?;
        let (inbox, ended, state_buffers, changed) = Default::default();
        let writing = Mutex::new(Ok(()));
        let connection =
            Arc::new(Self { stream, tls, keepalive, writing, inbox, ended, state_buffers, changed });
        let records = vec![0; if connection.tls.is_some() { RECORDS_LEN } else { 0 }];
        let listener =
            Listener { connection: connection.clone(), records, kept_alive: Instant::now(), unanswered: 0 };
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
        let leave = || !interrupted && self.inbox().interrupted;
        self.sealed(frame).and_then(|bytes| self.write(&bytes, limit, leave)).map_err(|error| {
            *whole = Err(());
            match error.kind() {
                io::ErrorKind::WouldBlock => ControlError::NotTaken { message: name, limit },
                io::ErrorKind::Interrupted => ControlError::Interrupted,
                _ => ControlError::Io(error),
            }
        })
    }

    /// The bytes of a frame on the wire.
    fn sealed<'frame>(&self, frame: &'frame [u8]) -> io::Result<Cow<'frame, [u8]>> {
        let Some(tls) = &self.tls else { return Ok(frame.into()) };
        Ok(tls.lock().ignore_poison().encrypt(frame)?.into())
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
        // A record that was made must be sent: the next could not be decrypted without it.
        if self.tls.is_some() && !self.takes_bytes() {
            return;
        }
        let Ok(bytes) = self.sealed(frame.as_bytes()) else {
            *whole = Err(());
            return;
        };
        // The reader reports errors of the connection.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = match SockRef::from(&self.stream).send_with_flags(&bytes, flags) {
            Ok(sent) => sent,
            Err(_) if self.tls.is_some() => 0,
            Err(_) => return,
        };
        *whole = self.write(&bytes[sent..], self.keepalive, || false).map_err(drop);
    }

    /// Whether the socket buffer has space.
    fn takes_bytes(&self) -> bool {
        let mut socket = [PollFd::new(&self.stream, PollFlags::OUT)];
        poll(&mut socket, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
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
    /// Space for records of TLS.
    records: Vec<u8>,
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
            match self.read(buffer)? {
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

    /// Reads some bytes of the peer. A part of a record is no byte yet, and an interruption.
    fn read(&mut self, buffer: &mut [u8]) -> Result<io::Result<usize>, End> {
        let Connection { stream, tls, .. } = &*self.connection;
        let mut stream = stream;
        let Some(tls) = tls else { return Ok(stream.read(buffer)) };
        let count = tls.lock().ignore_poison().read(buffer);
        if count > 0 {
            return Ok(Ok(count));
        }
        let count = match stream.read(&mut self.records) {
            Ok(count @ 1..) => count,
            ended => return Ok(ended),
        };
        self.unanswered = 0;
        let mut session = tls.lock().ignore_poison();
        session.feed(&self.records[..count]).map_err(|_| End::Tls)?;
        Ok(match session.read(buffer) {
            0 if session.is_closed() => Ok(0),
            0 => Err(io::ErrorKind::Interrupted.into()),
            count => Ok(count),
        })
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
mod tests;

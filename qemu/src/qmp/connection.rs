//! One connection to QEMU's monitor: commands out, answers and events in.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::connect::{Peer, connect, peer};
use super::error::QmpError;
use super::events::{Hub, Notice};
use super::line::{Answer, Line, Lines};

/// A command for QEMU.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) command: &'a str,
    pub(super) arguments: &'a Value,
    /// Passed along with the command.
    pub(super) descriptor: Option<BorrowedFd<'a>>,
    /// The longest wait for the answer, which ends at the deadline.
    pub(super) limit: Duration,
    pub(super) deadline: Instant,
}

impl Request<'_> {
    fn unsent(&self, error: impl Into<io::Error>) -> QmpError {
        QmpError::Unsent { command: self.command.to_owned(), error: error.into() }
    }

    fn left(&self) -> Option<Duration> {
        self.deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// A connection, of which a thread reads. It ends on [`close`](Self::close), or when QEMU ends it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    peer: Peer,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    greeted: bool,
    /// A thread writes a command.
    sending: bool,
    next_id: u64,
    /// The commands without an answer that a thread waits for.
    awaited: HashMap<u64, Option<Answer>>,
    /// Why the connection ended.
    closed: Option<String>,
}

impl Connection {
    /// Connects, and waits for the greeting. QEMU accepts commands after `qmp_capabilities`.
    pub(super) fn open(path: &Path, hub: Arc<Hub>, request: &Request<'_>) -> Result<Arc<Self>, QmpError> {
        let failed = |error| QmpError::Connect { path: path.to_owned(), error };
        let busy = || QmpError::Busy { path: path.to_owned() };
        let stream = connect(path, request.left().ok_or_else(busy)?).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => busy(),
            _ => failed(error),
        })?;
        let peer = peer(&stream).map_err(failed)?;
        let (state, changed) = (Mutex::default(), Condvar::new());
        let this = Arc::new(Self { stream, peer, state, changed });
        let reads = Arc::clone(&this);
        let started = thread::Builder::new().name("qmp".into()).spawn(move || reads.read(&hub));
        started.map_err(failed)?;

        let mut state = this.lock();
        loop {
            if state.greeted {
                drop(state);
                return Ok(this);
            }
            if let Some(why) = &state.closed {
                return Err(QmpError::NotQmp { path: path.to_owned(), what: why.clone() });
            }
            let Some(left) = request.left() else {
                drop(state);
                this.close("no greeting");
                return Err(busy());
            };
            state = this.wait(state, left);
        }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().closed.is_none()
    }

    /// Ends the connection, and the wait of all threads.
    pub(super) fn close(&self, why: &str) {
        self.lock().closed.get_or_insert_with(|| why.to_owned());
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }

    /// Makes QEMU execute a command; returns its answer.
    pub(super) fn execute(&self, request: &Request<'_>) -> Result<Value, QmpError> {
        let turn = self.turn(request)?;
        let id = turn.id;
        let (command, arguments) = (request.command, request.arguments);
        let began = Instant::now();
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        if let Err(error) = self.send(&format!("{message}\n"), request) {
            self.lock().awaited.remove(&id);
            return Err(error);
        }
        // QEMU keeps one descriptor until a command takes it, so no other may come before the answer.
        let held = request.descriptor.map(|_| turn);
        let answer = self.answer(id, request);
        drop(held);
        tracing::trace!(command, milliseconds = began.elapsed().as_secs_f64() * 1e3, "QEMU answered");
        match answer? {
            Answer::Return(value) => Ok(value),
            Answer::Error { class, description } => {
                Err(QmpError::Refused { command: command.to_owned(), class, description })
            }
        }
    }

    /// Waits until no other thread writes.
    fn turn(&self, request: &Request<'_>) -> Result<Turn<'_>, QmpError> {
        let mut state = self.lock();
        loop {
            if state.closed.is_some() {
                return Err(request.unsent(io::ErrorKind::NotConnected));
            }
            if !state.sending {
                state.sending = true;
                let id = state.next_id;
                state.next_id += 1;
                state.awaited.insert(id, None);
                return Ok(Turn { connection: self, id });
            }
            let left = request.left().ok_or_else(|| request.unsent(io::ErrorKind::TimedOut))?;
            state = self.wait(state, left);
        }
    }

    fn send(&self, message: &str, request: &Request<'_>) -> Result<(), QmpError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = request.descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors {
            // The space is that of one descriptor.
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let mut sent = 0;
        while sent < message.len() {
            let rest = &message.as_bytes()[sent..];
            match self.send_some(rest, &mut control, request) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => continue,
                // The next command would follow half of this one.
                Err(error) => {
                    let why = io::Error::from(error);
                    if sent > 0 || error != Errno::AGAIN {
                        self.close(&why.to_string());
                    }
                    // Without its last brace QEMU does not execute it.
                    return Err(match rest {
                        b"\n" => QmpError::Lost { command: request.command.to_owned(), why: why.to_string() },
                        _ => request.unsent(why),
                    });
                }
            }
            control.clear();
        }
        Ok(())
    }

    fn send_some(
        &self,
        bytes: &[u8],
        control: &mut SendAncillaryBuffer<'_, '_, '_>,
        request: &Request<'_>,
    ) -> Result<usize, Errno> {
        let left = request.left().ok_or(Errno::AGAIN)?;
        self.stream.set_write_timeout(Some(left)).map_err(|_| Errno::NOTCONN)?;
        sendmsg(&self.stream, &[IoSlice::new(bytes)], control, SendFlags::NOSIGNAL)
    }

    fn answer(&self, id: u64, request: &Request<'_>) -> Result<Answer, QmpError> {
        let command = || request.command.to_owned();
        let mut state = self.lock();
        loop {
            if let Some(answer) = state.awaited.get_mut(&id).and_then(Option::take) {
                state.awaited.remove(&id);
                return Ok(answer);
            }
            let missing = match (&state.closed, request.left()) {
                (Some(why), _) => QmpError::Lost { command: command(), why: why.clone() },
                (None, None) => QmpError::Late { command: command(), limit: request.limit },
                (None, Some(left)) => {
                    state = self.wait(state, left);
                    continue;
                }
            };
            state.awaited.remove(&id);
            return Err(missing);
        }
    }

    /// Reads until the connection ends.
    fn read(&self, hub: &Hub) {
        let mut lines = Lines::new(&self.stream);
        let why = loop {
            match lines.next() {
                Ok(Line::Event(event)) => hub.publish(&Notice::Event(event)),
                Ok(line) => {
                    if let Err(why) = self.deliver(line) {
                        break why.to_owned();
                    }
                }
                Err(error) => break error.to_string(),
            }
        };
        self.close(&why);
        hub.publish(&Notice::Gap);
    }

    fn deliver(&self, line: Line) -> Result<(), &'static str> {
        let mut state = self.lock();
        match line {
            Line::Greeting if !state.greeted => state.greeted = true,
            Line::Answer { id: Some(id), answer } if state.greeted && id < state.next_id => {
                // Without an entry, no thread waits any more.
                if let Some(awaited) = state.awaited.get_mut(&id) {
                    *awaited = Some(answer);
                }
            }
            Line::Answer { .. } => return Err("it answers what was not asked"),
            Line::Greeting => return Err("it greets twice"),
            Line::Event(_) => {}
        }
        self.changed.notify_all();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, left: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The right to write a command; dropping it lets the next thread write.
struct Turn<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.connection.lock().sending = false;
        self.connection.changed.notify_all();
    }
}

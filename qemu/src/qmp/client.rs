//! The client: commands of several threads, over one connection after the other.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::connect::Peer;
use super::connection::{Connection, Request};
use super::error::QmpError;
use super::events::{Events, Hub};

/// The longest wait for an answer, where the caller names no other.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A limit longer than this one counts as this one.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// When a condition is looked at again without an event: the time doubles from the first to the last.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// A client of one QEMU's monitor.
///
/// A clone is the same client. Several threads may use it at once, and each waits for its own answer. The
/// first call connects. After a connection broke, the next call connects anew, as long as the same process
/// listens; calls that were waiting fail as [`Lost`](QmpError::Lost).
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    hub: Arc<Hub>,
    link: Mutex<Link>,
    changed: Condvar,
}

#[derive(Debug)]
struct Link {
    state: LinkState,
    /// The process that listened at the first connection.
    process: Option<i32>,
}

#[derive(Debug)]
enum LinkState {
    None,
    /// A thread connects.
    Connecting,
    Connected(Arc<Connection>),
}

impl Client {
    /// A client that connects to this socket when it is first used.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let link = Mutex::new(Link { state: LinkState::None, process: None });
        let (path, hub, changed) = (path.into(), Arc::default(), Condvar::new());
        Self { shared: Arc::new(Shared { path, hub, link, changed }) }
    }

    /// Connects to this socket.
    ///
    /// # Errors
    ///
    /// No connection, or what listens there is no QEMU that has time for this client.
    pub fn connect(path: impl Into<PathBuf>) -> Result<Self, QmpError> {
        let this = Self::new(path);
        this.peer()?;
        Ok(this)
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// The process that listens at the socket: QEMU, unless another process gave QEMU its socket.
    ///
    /// # Errors
    ///
    /// No connection.
    pub fn peer(&self) -> Result<Peer, QmpError> {
        Ok(self.shared.connection(&request("connect", &Value::Null, ANSWER_MAX))?.peer())
    }

    /// Whether the connection is open, without asking QEMU. No call of another thread delays the answer.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match &self.shared.lock().state {
            LinkState::None => false,
            LinkState::Connecting => true,
            LinkState::Connected(connection) => connection.is_open(),
        }
    }

    /// Lets another client connect, for QEMU serves one at a time. The next call connects anew.
    pub fn disconnect(&self) {
        if let LinkState::Connected(connection) = &self.shared.lock().state {
            connection.close("this process disconnected");
        }
    }

    /// Makes QEMU execute a command within [`ANSWER_MAX`]; returns its answer.
    ///
    /// # Errors
    ///
    /// Those of [`execute_within`](Self::execute_within).
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        self.execute_within(ANSWER_MAX, command, arguments)
    }

    /// Makes QEMU execute a command; returns its answer. The time limit includes that for a new connection.
    ///
    /// # Errors
    ///
    /// QEMU's refusal, or no answer; [`QmpError::is_unknown`] tells whether QEMU may have executed it.
    pub fn execute_within(
        &self,
        limit: Duration,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, QmpError> {
        let request = request(command, arguments, limit);
        self.shared.connection(&request)?.execute(&request)
    }

    /// Gives QEMU a descriptor, under a name for other commands.
    ///
    /// # Errors
    ///
    /// Those of [`execute_within`](Self::execute_within).
    pub fn getfd(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        let request = Request { descriptor: Some(descriptor), ..request("getfd", &arguments, ANSWER_MAX) };
        self.shared.connection(&request)?.execute(&request).map(drop)
    }

    /// The events from now on. A broken connection is a [gap](super::Notice::Gap) between them; it takes a
    /// command to connect anew.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        self.shared.hub.subscribe()
    }

    /// Looks at a condition until it has a value, at each event and some times a second. No value by the
    /// deadline is `None`.
    ///
    /// # Errors
    ///
    /// The first error of the condition.
    pub fn wait_until<T, E>(
        &self,
        deadline: Instant,
        mut condition: impl FnMut(&Self) -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        let events = self.subscribe();
        let [mut look_again, look_again_max] = LOOK_AGAIN;
        loop {
            if let Some(value) = condition(self)? {
                return Ok(Some(value));
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            // Which event it is does not matter.
            let _ = events.next(deadline.min(now + look_again));
            look_again = (look_again * 2).min(look_again_max);
        }
    }
}

impl Shared {
    /// The present connection, or else a new one.
    fn connection(&self, request: &Request<'_>) -> Result<Arc<Connection>, QmpError> {
        let mut link = self.lock();
        loop {
            match &link.state {
                LinkState::Connected(connection) if connection.is_open() => {
                    return Ok(Arc::clone(connection));
                }
                LinkState::Connecting => {
                    let busy = || QmpError::Busy { path: self.path.clone() };
                    let left = request.deadline.checked_duration_since(Instant::now()).ok_or_else(busy)?;
                    link = self.changed.wait_timeout(link, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                LinkState::None | LinkState::Connected(_) => break,
            }
        }
        link.state = LinkState::Connecting;
        let before = link.process;
        drop(link);
        let opened = self.open(before, request);
        let mut link = self.lock();
        link.state = match &opened {
            Ok(connection) => {
                link.process = Some(connection.peer().process);
                LinkState::Connected(Arc::clone(connection))
            }
            Err(_) => LinkState::None,
        };
        self.changed.notify_all();
        opened
    }

    fn open(&self, before: Option<i32>, request: &Request<'_>) -> Result<Arc<Connection>, QmpError> {
        let connection = Connection::open(&self.path, Arc::clone(&self.hub), request)?;
        let now = connection.peer().process;
        let path = || self.path.clone();
        let ready = match before.filter(|&before| before != now) {
            Some(before) => Err(QmpError::OtherProcess { path: path(), before, now }),
            None => {
                let empty = json!({});
                let first =
                    Request { command: "qmp_capabilities", arguments: &empty, descriptor: None, ..*request };
                // The caller's command was not sent, whatever became of this one.
                connection.execute(&first).map_err(|error| match error {
                    QmpError::Late { .. } => QmpError::Busy { path: path() },
                    other => QmpError::NotQmp { path: path(), what: other.to_string() },
                })
            }
        };
        match ready {
            Ok(_) => Ok(connection),
            Err(error) => {
                connection.close("it is not wanted");
                Err(error)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let link = self.link.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let LinkState::Connected(connection) = &link.state {
            connection.close("this process has finished");
        }
    }
}

fn request<'a>(command: &'a str, arguments: &'a Value, limit: Duration) -> Request<'a> {
    let limit = limit.min(LIMIT_MAX);
    Request { command, arguments, descriptor: None, limit, deadline: Instant::now() + limit }
}

//! The server of a guest's control socket. The part of the program that holds the guest at the moment
//! answers.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use super::protocol::Request;
use super::socket::{Listener, read_line};
use crate::poison::IgnorePoison;

/// A request, or the reason for which the line is none.
pub(crate) type Asked = Result<Request, serde_json::Error>;

/// A part of the program that answers requests.
pub(crate) trait Serve: Send + Sync {
    /// Answers, or leaves the request to its successor.
    fn serve(&self, asked: Asked, stream: UnixStream) -> Served;
}

/// The result of serving a request.
pub(crate) enum Served {
    Done,
    /// The next holder of the guest has to answer.
    NotYet(Box<Asked>, UnixStream),
}

/// Serves a control socket; ends when dropped.
#[derive(Debug)]
pub(crate) struct Server(Arc<Shared>);

struct Shared {
    listener: Listener,
    desk: Mutex<Desk>,
    changed: Condvar,
}

#[derive(Default)]
struct Desk {
    who: Option<Arc<dyn Serve>>,
    /// How many servers have been installed.
    count: u64,
    closed: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Server {
    /// Requests wait until [`serve`](Self::serve) installs a server.
    pub(crate) fn new(listener: Listener) -> Self {
        let server = Self(Arc::new(Shared { listener, desk: Mutex::default(), changed: Condvar::new() }));
        let shared = server.0.clone();
        thread::spawn(move || {
            for stream in shared.listener.incoming() {
                let shared = shared.clone();
                // If no thread can start, the connection closes, and a later one may be served.
                let _ = thread::Builder::new().spawn(move || shared.converse(stream));
            }
        });
        server
    }

    /// Installs the server that answers from now on.
    pub(crate) fn serve(&self, who: Arc<dyn Serve>) {
        let mut desk = self.0.desk();
        desk.who = Some(who);
        desk.count += 1;
        self.0.changed.notify_all();
    }

    /// Removes the socket, so that no command finds the guest on this host any more.
    pub(crate) fn close(&self) {
        self.0.listener.close();
        let mut desk = self.0.desk();
        (desk.closed, desk.who) = (true, None);
        self.0.changed.notify_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn converse(&self, mut stream: UnixStream) {
        let Ok(reading) = stream.try_clone() else { return };
        let Ok(line) = read_line(&mut BufReader::new(reading)) else { return };
        let mut asked = serde_json::from_str(&line);
        let mut seen = 0;
        loop {
            let mut desk = self.desk();
            while !desk.closed && desk.count == seen {
                desk = self.changed.wait(desk).ignore_poison();
            }
            let Some(who) = desk.who.clone() else { return };
            seen = desk.count;
            drop(desk);
            match who.serve(asked, stream) {
                Served::Done => return,
                Served::NotYet(again, kept) => (asked, stream) = (*again, kept),
            }
        }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().ignore_poison()
    }
}

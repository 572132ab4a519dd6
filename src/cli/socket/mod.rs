//! The control sockets of guests: their place, and a client and a listener for one.

mod error;
mod folder;

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use self::folder::{Folder, Identity};
use super::protocol::{Answer, Request};
use crate::poison::IgnorePoison;

pub(crate) use self::error::SocketError;
pub(crate) use self::folder::{directory, name_of_socket, use_directory};

/// The longest line that either side takes, in bytes.
const LINE_MAX: u64 = 1 << 20;

/// A guest's name from the command line.
pub(crate) fn parse_name(name: &str) -> Result<String, String> {
    check_name(name).map(|()| name.to_owned()).map_err(|error| error.to_string())
}

/// Checks that a name can be a guest's.
pub(crate) fn check_name(name: &str) -> Result<(), SocketError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.') {
        return Ok(());
    }
    Err(SocketError::Name(name.chars().take(80).collect()))
}

/// The folder of this process's control sockets, for a guest's state file: other processes of this host find
/// them by it.
pub(crate) fn contact() -> String {
    let folder = directory();
    std::path::absolute(&folder).unwrap_or(folder).display().to_string()
}

/// The control socket of a guest that this process holds; dropping it removes the socket.
#[derive(Debug)]
pub(crate) struct Listener {
    place: Arc<Place>,
    listener: UnixListener,
    closed: AtomicBool,
}

/// The place of such a socket.
#[derive(Debug)]
struct Place {
    folder: Folder,
    name: String,
    identity: Identity,
}

/// The sockets of this process.
static OPEN: Mutex<Vec<Weak<Place>>> = Mutex::new(Vec::new());

/// Removes the sockets of this process, which is about to end.
pub(crate) fn remove_all() {
    let open = std::mem::take(&mut *OPEN.lock().ignore_poison());
    open.iter().filter_map(Weak::upgrade).for_each(|place| place.remove());
}

impl Listener {
    /// Makes the socket; only this user can connect.
    pub(crate) fn bind(name: &str) -> Result<Self, SocketError> {
        check_name(name)?;
        let folder = Folder::make()?;
        let make = |error| SocketError::Make { path: folder.path(name), error };
        // Of two processes that start at once, the second finds the first's socket.
        let locked = folder.lock().map_err(make)?;
        match folder.connect(name) {
            Ok(_) => return Err(SocketError::Taken(name.to_owned())),
            Err(SocketError::NoGuest { .. }) => {}
            Err(error) => return Err(error),
        }
        // The socket of a killed process.
        if folder.identity(name).is_some() {
            folder.remove(name).map_err(make)?;
        }
        let (listener, identity) = folder.bind(name).map_err(make)?;
        drop(locked);
        let place = Arc::new(Place { folder, name: name.to_owned(), identity });
        let mut open = OPEN.lock().ignore_poison();
        open.retain(|place| place.strong_count() > 0);
        open.push(Arc::downgrade(&place));
        Ok(Self { place, listener, closed: AtomicBool::new(false) })
    }

    /// The connections of clients, until the listener is closed.
    pub(crate) fn incoming(&self) -> impl Iterator<Item = UnixStream> {
        self.listener
            .incoming()
            .take_while(|_| !self.closed.load(Ordering::Relaxed))
            .inspect(|accepted| {
                if accepted.is_err() {
                    // For example, no descriptor is free; that may change.
                    thread::sleep(Duration::from_millis(50));
                }
            })
            .flatten()
    }

    /// Removes the socket, so that no command finds the guest on this host any more.
    pub(crate) fn close(&self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        self.place.remove();
        // Wakes the thread that waits for the next connection; it may have ended.
        let _ = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl Place {
    /// Removes the socket, unless it was already removed and the name belongs to another socket.
    fn remove(&self) {
        let removed = self.folder.lock().and_then(|_locked| {
            let is_ours = self.folder.identity(&self.name) == Some(self.identity);
            if is_ours { self.folder.remove(&self.name) } else { Ok(()) }
        });
        // The folder may be gone as well.
        if let Some(error) = removed.err().filter(|error| error.kind() != io::ErrorKind::NotFound) {
            tracing::warn!("{} stays: {error}", self.folder.path(&self.name));
        }
    }
}

/// A connection to the process that holds a guest.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the holder of a guest.
    pub(crate) fn connect(name: &str) -> Result<Self, SocketError> {
        Self::connect_in(&directory(), name)
    }

    fn connect_in(folder: &Path, name: &str) -> Result<Self, SocketError> {
        check_name(name)?;
        let stream = match Folder::open_at(folder) {
            Ok(folder) => folder.connect(name)?,
            Err(SocketError::Open { path, error }) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SocketError::NoGuest { name: name.to_owned(), path, error });
            }
            Err(error) => return Err(error),
        };
        let lines = BufReader::new(stream.try_clone().map_err(SocketError::Broken)?);
        Ok(Self { stream, lines })
    }

    /// Sends a request.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<(), SocketError> {
        write_line(&mut self.stream, request).map_err(SocketError::Broken)
    }

    /// The next answer.
    pub(crate) fn answer(&mut self) -> Result<Answer, SocketError> {
        let line = read_line(&mut self.lines).map_err(SocketError::Broken)?;
        serde_json::from_str(&line).map_err(SocketError::Words)
    }
}

/// Sends one request and returns its one answer.
pub(crate) fn ask(name: &str, request: &Request) -> Result<Answer, SocketError> {
    let mut client = Client::connect(name)?;
    client.ask(request)?;
    client.answer()
}

/// The same for a process with its control socket in another folder than this process's.
pub(crate) fn ask_in(folder: &Path, name: &str, request: &Request) -> Result<Answer, SocketError> {
    let mut client = Client::connect_in(folder, name)?;
    client.ask(request)?;
    client.answer()
}

/// The same, if the process answers in time.
pub(crate) fn try_ask_in(
    folder: &Path,
    name: &str,
    request: &Request,
    limit: Duration,
) -> Result<Answer, SocketError> {
    let mut client = Client::connect_in(folder, name)?;
    client.stream.set_read_timeout(Some(limit)).map_err(SocketError::Broken)?;
    client.ask(request)?;
    client.answer()
}

/// Writes a value as a line.
pub(crate) fn write_line(stream: &mut UnixStream, value: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a line of bounded length; an end before it is an error.
pub(crate) fn read_line(lines: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    io::Read::take(&mut *lines, LINE_MAX).read_line(&mut line)?;
    if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn of_many_that_bind_a_name_at_once_one_gets_it_and_only_that_removes_it() {
        const TOGETHER: usize = 4;
        let private = std::fs::Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().permissions(private).tempdir().unwrap();
        use_directory(folder.path());
        let path = folder.path().join("tern.sock");
        for _ in 0..200 {
            // The socket of a killed process; each starting process would remove it.
            let left = Folder::open().unwrap().bind("tern").unwrap();
            drop(left);
            let barrier = Barrier::new(TOGETHER);
            let bound = thread::scope(|scope| {
                let bind = || {
                    barrier.wait();
                    Listener::bind("tern")
                };
                let binding: Vec<_> = (0..TOGETHER).map(|_| scope.spawn(bind)).collect();
                binding.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            let (won, lost): (Vec<_>, Vec<_>) = bound.into_iter().partition(Result::is_ok);
            assert_eq!(won.len(), 1, "{won:?}");
            assert!(lost.iter().all(|lost| matches!(lost, Err(SocketError::Taken(_)))), "{lost:?}");
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);

            // A listener leaves its successor's socket alone after its own was removed by hand.
            std::fs::remove_file(&path).unwrap();
            let next = Listener::bind("tern").unwrap();
            drop(won);
            assert!(path.exists());
            drop(next);
            assert!(!path.exists());
        }
    }
}

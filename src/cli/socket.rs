//! Where the control sockets of guests are, and how to talk to one.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use thiserror::Error;

use super::protocol::{Answer, Request};

/// The longest line that either side takes, in bytes.
const LINE_MAX: u64 = 1 << 20;

/// What can be wrong with a control socket.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    #[error(
        "`{0}` is no name for a guest: use up to 64 letters, digits, `-`, `_` and `.`, not beginning with `.`"
    )]
    Name(String),
    #[error("no guest named {name} runs on this host ({path}: {error})")]
    NoGuest { name: String, path: String, error: io::Error },
    #[error("a guest named {0} runs on this host already: choose another name")]
    Taken(String),
    #[error("cannot make the control socket {path}: {error}")]
    Make { path: String, error: io::Error },
    #[error("{0} belongs to another user or is open to others: it must be yours, mode 0700")]
    Directory(String),
    #[error("the process that holds the guest went away: {0}")]
    Broken(#[source] io::Error),
    #[error("the process that holds the guest answers in another version's words: {0}")]
    Words(#[source] serde_json::Error),
}

/// A folder chosen by this process itself, which goes before all others.
static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// Uses another folder for the control sockets from here on; the first choice stays.
pub(crate) fn use_directory(directory: &Path) {
    let _ = CHOSEN.set(directory.to_owned());
}

/// The folder of the control sockets: `$STERNA_RUNTIME_DIR`, else that of the user's session, else a private one in /run or /tmp.
pub(crate) fn directory() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = CHOSEN.get().cloned().or_else(|| set("STERNA_RUNTIME_DIR")) {
        return directory;
    }
    let user = fs::metadata("/proc/self").map_or(0, |process| process.uid());
    match set("XDG_RUNTIME_DIR") {
        Some(session) if session.is_dir() => session.join("sterna"),
        _ if user == 0 => PathBuf::from("/run/sterna"),
        _ => PathBuf::from(format!("/tmp/sterna-{user}")),
    }
}

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

fn path(name: &str) -> PathBuf {
    directory().join(format!("{name}.sock"))
}

/// How the process that holds a guest can be reached, for its state file.
pub(crate) fn contact(name: &str) -> String {
    let path = path(name);
    std::path::absolute(&path).unwrap_or(path).display().to_string()
}

/// Whether a process holds a guest of that name.
fn is_taken(name: &str) -> bool {
    UnixStream::connect(path(name)).is_ok()
}

/// The control socket of a guest that this process holds; gone when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    path: PathBuf,
    listener: UnixListener,
    closed: AtomicBool,
}

impl Listener {
    /// Makes the socket, for this user alone.
    pub(crate) fn bind(name: &str) -> Result<Self, SocketError> {
        check_name(name)?;
        let (directory, path) = (directory(), path(name));
        let make = |error| SocketError::Make { path: path.display().to_string(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(make)?;
        let (found, process) =
            (fs::metadata(&directory).map_err(make)?, fs::metadata("/proc/self").map_err(make)?);
        if found.uid() != process.uid() || found.mode() & 0o077 != 0 {
            return Err(SocketError::Directory(directory.display().to_string()));
        }
        if is_taken(name) {
            return Err(SocketError::Taken(name.to_owned()));
        }
        // What is left of a process that was killed.
        if fs::symlink_metadata(&path).is_ok_and(|left| left.file_type().is_socket()) {
            fs::remove_file(&path).map_err(make)?;
        }
        let listener = UnixListener::bind(&path).map_err(make)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(make)?;
        Ok(Self { path, listener, closed: AtomicBool::new(false) })
    }

    /// The conversations that others begin, until it is closed.
    pub(crate) fn incoming(&self) -> impl Iterator<Item = UnixStream> {
        self.listener
            .incoming()
            .take_while(|_| !self.closed.load(Ordering::Relaxed))
            .inspect(|accepted| {
                if accepted.is_err() {
                    // No descriptor is left, say; that may change.
                    thread::sleep(Duration::from_millis(50));
                }
            })
            .flatten()
    }

    /// Takes the socket away, so that nobody finds the guest here any more.
    pub(crate) fn close(&self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            // By now the path may be another's.
            return;
        }
        // Somebody else removed it: as good.
        let _ = fs::remove_file(&self.path);
        // Wakes whoever waits for the next conversation; nobody may.
        let _ = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

/// A conversation with the process that holds a guest.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the holder of a guest.
    pub(crate) fn connect(name: &str) -> Result<Self, SocketError> {
        check_name(name)?;
        Self::connect_at(&path(name), name)
    }

    /// The same, by way of the socket at `path`.
    fn connect_at(path: &Path, name: &str) -> Result<Self, SocketError> {
        let stream = UnixStream::connect(path).map_err(|error| SocketError::NoGuest {
            name: name.to_owned(),
            path: path.display().to_string(),
            error,
        })?;
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

/// Asks one thing and returns the one answer.
pub(crate) fn ask(name: &str, request: &Request) -> Result<Answer, SocketError> {
    let mut client = Client::connect(name)?;
    client.ask(request)?;
    client.answer()
}

/// The same of the process that is reached at this socket.
pub(crate) fn ask_at(path: &Path, name: &str, request: &Request) -> Result<Answer, SocketError> {
    let mut client = Client::connect_at(path, name)?;
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

//! The folder of the control sockets. It belongs to this user alone, and this module uses it by handle, so
//! that no other user can replace it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::geteuid;

use super::error::SocketError;

/// A folder that this process chose itself, which takes precedence over all others.
static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// Uses another folder for the control sockets from now on; a first choice stays.
pub(crate) fn use_directory(directory: &Path) {
    let _ = CHOSEN.set(directory.to_owned());
}

/// The folder of the control sockets: `$STERNA_RUNTIME_DIR`, else that of the user's session, else a private
/// one in /run or /tmp.
pub(crate) fn directory() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = CHOSEN.get().cloned().or_else(|| set("STERNA_RUNTIME_DIR")) {
        return directory;
    }
    let user = geteuid().as_raw();
    match set("XDG_RUNTIME_DIR") {
        Some(session) if session.is_dir() => session.join("sterna"),
        _ if user == 0 => PathBuf::from("/run/sterna"),
        _ => PathBuf::from(format!("/tmp/sterna-{user}")),
    }
}

/// The folder, open. Only this user and root can change its content.
#[derive(Debug)]
pub(super) struct Folder {
    handle: OwnedFd,
    path: PathBuf,
}

/// The identity of a control socket's file: its device and inode.
pub(super) type Identity = (u64, u64);

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;

/// How long another process may keep the folder locked; it needs microseconds.
const LOCKED_MAX: Duration = Duration::from_secs(10);

impl Folder {
    /// Opens the folder, and makes it if it is missing.
    pub(super) fn make() -> Result<Self, SocketError> {
        let path = directory();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|error| SocketError::Make { path: path.display().to_string(), error })?;
        Self::open()
    }

    /// Opens the folder, and checks its owner.
    pub(super) fn open() -> Result<Self, SocketError> {
        Self::open_at(&directory())
    }

    /// The same for another folder than this process's.
    pub(super) fn open_at(path: &Path) -> Result<Self, SocketError> {
        let open = |error: Errno| SocketError::Open { path: path.display().to_string(), error: error.into() };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty()).map_err(open)?;
        if is_ours_alone(&rustix::fs::fstat(&handle).map_err(open)?) {
            Ok(Self { handle, path: path.to_owned() })
        } else {
            Err(SocketError::Folder(path.display().to_string()))
        }
    }

    /// The path of a guest's socket, for messages.
    pub(super) fn path(&self, name: &str) -> String {
        self.path.join(file_name(name)).display().to_string()
    }

    /// Excludes all other processes that would make or remove a socket, until the returned handle is dropped.
    pub(super) fn lock(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Opened anew for each lock, so that it also excludes other threads.
        let lock = rustix::fs::openat(&self.handle, ".", flags, Mode::empty())?;
        let deadline = Instant::now() + LOCKED_MAX;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::INTR) => {}
                locked => return Ok(locked.map(|()| lock)?),
            }
        }
    }

    /// Connects to the process that listens at a guest's socket, if the process belongs to this user or root.
    pub(super) fn connect(&self, name: &str) -> Result<UnixStream, SocketError> {
        let none =
            |error: io::Error| SocketError::NoGuest { name: name.to_owned(), path: self.path(name), error };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&self.handle, file_name(name), flags, Mode::empty())
            .map_err(|error| none(error.into()))?;
        let found = rustix::fs::fstat(&socket).map_err(|error| none(error.into()))?;
        if !is_socket(&found) || !is_ours_alone(&found) {
            return Err(SocketError::Stranger(self.path(name)));
        }
        let stream = UnixStream::connect(by_handle(&socket)).map_err(none)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| none(error.into()))?;
        if peer.uid == geteuid() || peer.uid.is_root() {
            Ok(stream)
        } else {
            Err(SocketError::Stranger(self.path(name)))
        }
    }

    /// Listens at a guest's socket, which must not exist yet; only this user can connect, from the first
    /// moment on.
    pub(super) fn bind(&self, name: &str) -> io::Result<(UnixListener, Identity)> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // The file that bind(2) makes has the mode of the socket.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let path = by_handle(&self.handle).join(file_name(name));
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let identity = self.identity(name).ok_or(io::ErrorKind::NotFound)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok((UnixListener::from(socket), identity))
    }

    /// The identity of the socket with a guest's name, if it exists.
    pub(super) fn identity(&self, name: &str) -> Option<Identity> {
        let found = rustix::fs::statat(&self.handle, file_name(name), AtFlags::SYMLINK_NOFOLLOW).ok()?;
        is_socket(&found).then_some((found.st_dev, found.st_ino))
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.handle, file_name(name), AtFlags::empty())?)
    }
}

fn file_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// The guest whose control socket has this name in the folder, if it is one.
pub(crate) fn name_of_socket(file: &str) -> Option<String> {
    file.strip_suffix(SUFFIX).map(str::to_owned)
}

const SUFFIX: &str = ".sock";

/// A path to the file behind a handle, because neither connect(2) nor bind(2) takes a handle. The path is
/// also short enough for them.
fn by_handle(handle: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()))
}

fn is_ours_alone(found: &Stat) -> bool {
    found.st_uid == geteuid().as_raw() && found.st_mode & 0o077 == 0
}

fn is_socket(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Socket
}

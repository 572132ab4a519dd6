//! An arbiter between two hosts: a file on shared storage, locked by the host that runs the guest.
//!
//! The records and the messages of a handover need no arbiter. It guards against what they cannot know: an
//! operator's word that is false, a guest that is started by hand on a third host, a state file that was
//! lost.
//!
//! The source acquires the lock before the guest starts and releases it right before GO leaves, once
//! COMMITTED is recorded. The destination acquires it before RUNNING is recorded, or refuses. A source that
//! takes the guest back acquires the lock first.
//!
//! The lock is a `flock(2)`, which belongs to the open file and so ends with the process, however the process
//! ends. Its worth depends on the file system. A local file system arbitrates between processes of this host.
//! NFS (where Linux turns it into a byte-range lock at the server), CephFS, GFS2, OCFS2 and others that carry
//! `flock` arbitrate between hosts; both ends check beforehand whether it does. An NFS server revokes the
//! lock of a client that it has not heard from for the time of a lease, and the guest at that client is not
//! informed and runs on. So with a lease an arbiter is only as good as the fencing of the host that lost the
//! lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::error_code::coded;
use crate::poison::IgnorePoison;
use crate::wire::LockToken;

/// The lock of one guest on one host. Clones are the same lock, which is held until it is released or the
/// last clone is dropped.
#[derive(Clone, Debug)]
pub struct Lock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The open file while the lock is held.
    file: Option<File>,
    /// The lock's token from the file, once known. A file with another token is refused.
    token: Option<LockToken>,
}

/// Why a lock is not held, or is of no use.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(LockErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum LockError {
    /// Another process holds the lock.
    #[error(
        "the lock {path} is held by another process{by}: the guest may run there. Let that end, or wait for it"
    )]
    Held {
        /// The file.
        path: PathBuf,
        /// The process that acquired it last, according to the file.
        by: String,
    },
    /// A guest runs on this host without its lock.
    #[error("the lock {0} is not held on this host, where the guest runs: take it before the guest starts")]
    NotHeld(PathBuf),
    /// The lock file is not the one that the source holds.
    #[error(
        "the lock {0} is another file than the source's: both ends need one file, on storage that they share"
    )]
    Other(PathBuf),
    /// The lock does not exclude other hosts: two hosts can hold it at the same time.
    #[error(
        "the lock {0} is no arbiter: the source holds it, and this host could still take it. It must be one file on a file \
         system that carries locks between hosts"
    )]
    NoArbiter(PathBuf),
    /// The file is not a lock file of Sterna.
    #[error("{0} is no lock file of sterna, and is left alone: name one that is empty, or does not exist")]
    Foreign(PathBuf),
    /// The file system refused an operation on the lock file.
    #[error("cannot {what} the lock {path}: {error}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
}

coded!(LockError, LockErrorKind, "lock");

impl Lock {
    /// The lock at this path, which may differ between hosts. It is not acquired yet.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Inner { path: path.into(), state: Mutex::default() }))
    }

    /// Acquires the lock, and makes the file if it is missing. Does nothing if this value holds it already.
    ///
    /// # Errors
    /// [`LockError`]; the lock is not held then, and the guest must not run on this host.
    pub fn take(&self) -> Result<(), LockError> {
        let mut state = self.state();
        if state.file.is_some() {
            return Ok(());
        }
        let file = self.open(state.token.is_none())?;
        if !self.lock(&file)? {
            return Err(self.held(&file));
        }
        // The file may have been replaced meanwhile, and other processes would lock the new one.
        if !is_at(&file, &self.0.path) {
            return Err(self.failed("lock")(ErrorKind::NotFound.into()));
        }
        let token = match self.read(&file)? {
            Some(token) => token,
            None if state.token.is_none() => self.name(&file)?,
            None => return Err(LockError::Other(self.0.path.clone())),
        };
        if state.token.is_some_and(|known| known != token) {
            return Err(LockError::Other(self.0.path.clone()));
        }
        // For messages; the lock is held without it.
        let _ = file.write_all_at(&holder(), HEAD_LEN as u64);
        (state.file, state.token) = (Some(file), Some(token));
        Ok(())
    }

    /// As [`take`](Self::take), but waits up to `limit` for the holder to release the lock.
    ///
    /// # Errors
    /// [`LockError`].
    pub(crate) fn take_within(&self, limit: Duration) -> Result<(), LockError> {
        let deadline = Instant::now() + limit;
        loop {
            match self.take() {
                Err(LockError::Held { .. }) if Instant::now() < deadline => thread::sleep(NAP),
                taken => return taken,
            }
        }
    }

    /// Releases the lock, if it is held: the guest must not run on this host from now on.
    pub fn give_up(&self) {
        if let Some(file) = self.state().file.take()
            && let Err(error) = rustix::fs::flock(&file, FlockOperation::Unlock)
        {
            // The lock ends with the file, which is closed now.
            tracing::warn!("{}", self.failed("give up")(error.into()));
        }
    }

    /// The token by which the other side knows the lock.
    ///
    /// # Errors
    /// [`LockError::NotHeld`].
    pub(crate) fn token(&self) -> Result<LockToken, LockError> {
        let state = self.state();
        let held = state.file.as_ref().and(state.token);
        held.ok_or_else(|| LockError::NotHeld(self.0.path.clone()))
    }

    /// At the destination: checks that it is the source's lock, and that the source's hold keeps this host
    /// from acquiring it.
    ///
    /// # Errors
    /// [`LockError`].
    pub(crate) fn arbitrates(&self, token: LockToken) -> Result<(), LockError> {
        let mut state = self.state();
        let file = self.open(false)?;
        if self.read(&file)? != Some(token) {
            return Err(LockError::Other(self.0.path.clone()));
        }
        if self.lock(&file)? {
            return Err(LockError::NoArbiter(self.0.path.clone()));
        }
        state.token = Some(token);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().ignore_poison()
    }

    fn open(&self, make: bool) -> Result<File, LockError> {
        let path = &self.0.path;
        let mut options = OpenOptions::new();
        // Opening something other than a regular file must not block.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        options.read(true).write(true).create(make).mode(0o660).custom_flags(flags);
        let file = options.open(path).map_err(self.failed("open"))?;
        let found = file.metadata().map_err(self.failed("look at"))?;
        let ours = found.is_file() && found.len() <= (HEAD_LEN + HOLDER_LEN) as u64;
        if ours { Ok(file) } else { Err(LockError::Foreign(path.clone())) }
    }

    /// Locks the file; false if another process holds the lock.
    fn lock(&self, file: &File) -> Result<bool, LockError> {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(self.failed("lock")(error.into())),
        }
    }

    /// The token in the file; `None` if it is empty.
    fn read(&self, file: &File) -> Result<Option<LockToken>, LockError> {
        let len = file.metadata().map_err(self.failed("look at"))?.len();
        if len == 0 {
            return Ok(None);
        }
        let mut head = [0; HEAD_LEN];
        let read = file.read_exact_at(&mut head, 0);
        let token = read.ok().and_then(|()| {
            let digits = head.strip_prefix(MAGIC)?.strip_suffix(b"\n")?;
            let mut token = [0; TOKEN_LEN];
            for (byte, digits) in token.iter_mut().zip(digits.chunks(2)) {
                *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            }
            Some(LockToken(token))
        });
        token.map(Some).ok_or_else(|| LockError::Foreign(self.0.path.clone()))
    }

    /// Gives an empty, locked file a new token.
    fn name(&self, file: &File) -> Result<LockToken, LockError> {
        let mut token = [0; TOKEN_LEN];
        let random = |error: getrandom::Error| self.failed("name")(io::Error::other(error.to_string()));
        getrandom::fill(&mut token).map_err(random)?;
        let mut head = MAGIC.to_vec();
        token.iter().for_each(|byte| head.extend(format!("{byte:02x}").bytes()));
        head.push(b'\n');
        // The other host must see it.
        file.write_all_at(&head, 0).and_then(|()| file.sync_all()).map_err(self.failed("write to"))?;
        Ok(LockToken(token))
    }

    fn held(&self, file: &File) -> LockError {
        let mut text = vec![0; HOLDER_LEN];
        let len = file.read_at(&mut text, HEAD_LEN as u64).unwrap_or(0);
        // The text is shown in a terminal, whatever it contains.
        let by: String = text[..len].iter().map(|&byte| char::from(byte)).filter(|&c| is_plain(c)).collect();
        let by = match by.trim() {
            "" => String::new(),
            by => format!(", last taken by {by}"),
        };
        LockError::Held { path: self.0.path.clone(), by }
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> LockError {
        move |error| LockError::Io { what, path: self.0.path.clone(), error }
    }
}

/// Whether this path refers to the open file.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().map(place).is_ok_and(|opened| fs::metadata(path).map(place).is_ok_and(|at| at == opened))
}

/// The holder, for messages: padded to a fixed length, to replace the previous text.
fn holder() -> Vec<u8> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut text = format!("process {} on {}", process::id(), host.trim()).into_bytes();
    text.resize(HOLDER_LEN - 1, b' ');
    text.push(b'\n');
    text
}

fn is_plain(c: char) -> bool {
    c.is_ascii_graphic() || c == ' '
}

/// How long a host waits for the lock of a guest that it now owns: the other side is about to release it.
pub(crate) const LOCK_MAX: Duration = Duration::from_secs(5);

/// How long to sleep before the next try.
const NAP: Duration = Duration::from_millis(20);

/// The file's first line: this, the token in hexadecimal digits, and the line's end.
const MAGIC: &[u8] = b"sterna lock ";
const TOKEN_LEN: usize = 16;
const HEAD_LEN: usize = MAGIC.len() + 2 * TOKEN_LEN + 1;

/// Length of the second line, which names the process that acquired the lock last.
const HOLDER_LEN: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tern.lock");
        (folder, path)
    }

    #[test]
    fn one_holds_it_at_a_time_and_the_other_is_told_who() {
        let (_folder, path) = folder();
        let (here, there) = (Lock::at(&path), Lock::at(&path));
        assert!(matches!(here.token(), Err(LockError::NotHeld(_))));
        here.take().unwrap();
        here.clone().take().unwrap();
        let error = there.take().unwrap_err();
        assert!(matches!(error, LockError::Held { .. }));
        assert!(error.to_string().contains(&format!("process {}", process::id())), "{error}");
        assert!(there.take_within(Duration::from_millis(50)).is_err());
        let token = here.token().unwrap();
        there.arbitrates(token).unwrap();
        here.give_up();
        here.give_up();
        there.take_within(LOCK_MAX).unwrap();
        assert_eq!(there.token().unwrap(), token);
        assert!(here.take().is_err());
        drop(there);
        here.take().unwrap();
    }

    #[test]
    fn what_is_no_arbiter_is_found_out() {
        let (folder, path) = folder();
        let here = Lock::at(&path);
        here.take().unwrap();
        let token = here.token().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(matches!(Lock::at(at("none")).arbitrates(token), Err(LockError::Io { .. })));
        assert!(!at("none").exists());
        fs::write(at("empty"), b"").unwrap();
        assert!(matches!(Lock::at(at("empty")).arbitrates(token), Err(LockError::Other(_))));
        Lock::at(at("other")).take().unwrap();
        assert!(matches!(Lock::at(at("other")).arbitrates(token), Err(LockError::Other(_))));
        fs::copy(&path, at("copy")).unwrap();
        assert!(matches!(Lock::at(at("copy")).arbitrates(token), Err(LockError::NoArbiter(_))));
        // It was the right lock, and is no longer.
        let there = Lock::at(&path);
        there.arbitrates(token).unwrap();
        here.give_up();
        fs::copy(at("other"), &path).unwrap();
        assert!(matches!(there.take(), Err(LockError::Other(_))));
        fs::write(&path, b"").unwrap();
        assert!(matches!(there.take(), Err(LockError::Other(_))));
        fs::remove_file(&path).unwrap();
        assert!(matches!(there.take(), Err(LockError::Io { .. })));
        assert!(!path.exists());
    }

    #[test]
    fn a_file_of_somebody_else_is_left_alone() {
        let (folder, path) = folder();
        for content in [&b"a disk"[..], &[0; HEAD_LEN], &[b'x'; 4096]] {
            fs::write(&path, content).unwrap();
            assert!(matches!(Lock::at(&path).take(), Err(LockError::Foreign(_))));
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        assert!(Lock::at(folder.path()).take().is_err());
    }
}

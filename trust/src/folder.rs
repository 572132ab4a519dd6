//! The folder of the key and the list, as strict as that of the state of guests: a user that may write to
//! it can trust any host.
//!
//! It belongs to the effective user, and neither group nor others may write to it or to a folder above it
//! (sticky folders such as `/tmp` excepted). The folder is no link, and links above it belong to root or to
//! the user. Files are opened relative to the handle, without following links.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process;

use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::trust_error::TrustError;

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    handle: OwnedFd,
    path: PathBuf,
    user: u32,
}

/// The users that may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readers {
    Owner,
    Anyone,
}

impl Folder {
    /// Opens a folder; `None` if it does not exist.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, TrustError> {
        Self::open_as(path, rustix::process::geteuid().as_raw())
    }

    /// The same; makes the folder, and the missing folders above it, if it does not exist.
    pub(crate) fn make(path: &Path) -> Result<Self, TrustError> {
        let user = rustix::process::geteuid().as_raw();
        check_above(path, user)?;
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
        Self::open_as(path, user)?.ok_or_else(|| failed("open", path)(ErrorKind::NotFound.into()))
    }

    fn open_as(path: &Path, user: u32) -> Result<Option<Self>, TrustError> {
        check_above(path, user)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(handle) => File::from(handle),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(TrustError::Kind(path.to_owned())),
            Err(error) => return Err(failed("open", path)(error.into())),
        };
        let found = handle.metadata().map_err(failed("look at", path))?;
        check_access(&found, path, user, Readers::Anyone)?;
        Ok(Some(Self { handle: handle.into(), path: path.to_owned(), user }))
    }

    /// Waits until no other process changes the files, and keeps others from it as long as this lives.
    pub(crate) fn lock(&self) -> Result<(), TrustError> {
        rustix::fs::flock(&self.handle, FlockOperation::LockExclusive)
            .map_err(|error| failed("lock", &self.path)(error.into()))
    }

    /// The path of a file, for messages.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a file; `None` if it does not exist.
    pub(crate) fn read(&self, name: &str, readers: Readers) -> Result<Option<Vec<u8>>, TrustError> {
        let path = self.path_of(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.handle, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(TrustError::Kind(path)),
            Err(error) => return Err(failed("open", &path)(error.into())),
        };
        let found = file.metadata().map_err(failed("look at", &path))?;
        if !found.is_file() {
            return Err(TrustError::Kind(path));
        }
        check_access(&found, &path, self.user, readers)?;
        let mut content = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut content).map_err(failed("read", &path))?;
        if content.len() as u64 > FILE_MAX { Err(TrustError::Long(path)) } else { Ok(Some(content)) }
    }

    /// Writes a file of mode 0600, which is whole and durable under its name, or unchanged.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), TrustError> {
        let path = self.path_of(name);
        let temporary = format!(".{name}.{}.new", process::id());
        let write = || -> io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = match rustix::fs::openat(&self.handle, &temporary, flags, Mode::RUSR | Mode::WUSR)
            {
                // A process with this number was killed: the lock is held, so no other process uses it.
                Err(Errno::EXIST) => {
                    self.remove(&temporary);
                    File::from(rustix::fs::openat(&self.handle, &temporary, flags, Mode::RUSR | Mode::WUSR)?)
                }
                made => File::from(made?),
            };
            file.write_all(content)?;
            file.sync_all()?;
            let folder = &self.handle;
            rustix::fs::renameat_with(folder, &temporary, folder, name, RenameFlags::empty())?;
            // Some file systems do not sync folders.
            match rustix::fs::fsync(folder) {
                Err(Errno::INVAL) | Ok(()) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        write().inspect_err(|_| self.remove(&temporary)).map_err(failed("write", &path))
    }

    fn remove(&self, name: &str) {
        // It may not have been made.
        let _ = rustix::fs::unlinkat(&self.handle, name, rustix::fs::AtFlags::empty());
    }
}

/// Checks that no other user can replace the folder, or a link on the way to it.
fn check_above(path: &Path, user: u32) -> Result<(), TrustError> {
    let absolute = std::path::absolute(path).map_err(failed("find", path))?;
    check_ancestors(&absolute, user)?;
    let Some(parent) = absolute.parent() else { return Ok(()) };
    match fs::canonicalize(parent) {
        Ok(real) => check_ancestors(&real.join("folder"), user),
        // It is made later, in a folder that was checked.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("find", parent)(error)),
    }
}

fn check_ancestors(path: &Path, user: u32) -> Result<(), TrustError> {
    for above in path.ancestors().skip(1) {
        let found = match fs::symlink_metadata(above) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("look at", above)(error)),
        };
        if found.uid() != 0 && found.uid() != user {
            return Err(TrustError::Owner { path: above.to_owned(), owner: found.uid(), user });
        }
        if found.is_dir() && found.mode() & OTHERS_WRITE != 0 && found.mode() & STICKY == 0 {
            return Err(refused(above, &found, "go-w"));
        }
    }
    Ok(())
}

fn check_access(found: &Metadata, path: &Path, user: u32, readers: Readers) -> Result<(), TrustError> {
    if found.uid() != user {
        return Err(TrustError::Owner { path: path.to_owned(), owner: found.uid(), user });
    }
    match readers {
        Readers::Owner if found.mode() & OTHERS_ACCESS != 0 => Err(refused(path, found, "go-rwx")),
        Readers::Anyone if found.mode() & OTHERS_WRITE != 0 => Err(refused(path, found, "go-w")),
        _ => Ok(()),
    }
}

fn refused(path: &Path, found: &Metadata, mend: &'static str) -> TrustError {
    TrustError::Access { path: path.to_owned(), mode: found.mode() & 0o7777, mend }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> TrustError {
    let path = path.to_owned();
    move |error| TrustError::Io { what, path: path.clone(), error }
}

const OTHERS_ACCESS: u32 = 0o077;
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// The longest file.
const FILE_MAX: u64 = 1 << 20;

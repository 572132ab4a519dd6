//! A folder for the state of guests: opened once, checked, and used by its handle from then on.
//!
//! Its content decides which host may run a guest. So no other user may be able to change it, and it must
//! outlast a restart of the host:
//!
//! - It belongs to the effective user, and neither its group nor others may write to it. Each folder above it
//!   belongs to root or to that user, and is not writable by group or others unless it is sticky, like
//!   `/tmp`.
//! - Links above it are followed if they belong to root or to that user. The folder itself may not be a link.
//! - File systems that lose their content or that other hosts can access are refused, unless the caller
//!   [accepts](StorageCheck::Accept) them.
//!
//! Files are opened, made and removed relative to the handle. If the folder is moved or replaced meanwhile,
//! nothing is redirected.

mod access;
mod durability;
mod error;
mod path;
mod storage;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FallocateFlags, FileType, IFlags, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use self::access::check_access;
use self::durability::sync;
pub use self::error::FolderError;
use self::error::failed;
use self::storage::Storage;
pub use self::storage::StorageCheck;

/// A folder in which a host keeps the state of its guests. Clones share one handle.
#[derive(Clone, Debug)]
pub struct StateFolder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: OwnedFd,
    /// For messages only; it is never opened.
    path: PathBuf,
    user: u32,
}

impl StateFolder {
    /// Opens the folder; makes it, and the missing folders above it, with mode 0700. A folder that was made
    /// is durable when this returns.
    ///
    /// # Errors
    /// [`FolderError`]. Nothing is made on a file system that is refused.
    pub fn open(path: &Path, check: StorageCheck) -> Result<Self, FolderError> {
        Self::open_as(path, check, rustix::process::geteuid().as_raw())
    }

    fn open_as(path: &Path, check: StorageCheck, user: u32) -> Result<Self, FolderError> {
        let (folder, path) = path::open(path, check, user)?;
        Ok(Self(Arc::new(Inner { folder, path, user })))
    }

    /// The path at which the folder was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Opens a file for reading, or for reading and writing; `None` if it does not exist. It must be a
    /// regular file of this user that others may not write to.
    pub(crate) fn open_file(&self, name: &str, write: bool) -> Result<Option<File>, FolderError> {
        let path = self.named(name)?;
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // Opening something other than a regular file must not block, and links are not followed.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.0.folder, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(FolderError::Link(path)),
            Err(Errno::ISDIR | Errno::NXIO) => return Err(FolderError::NotAFile(path)),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let found = rustix::fs::fstat(&file).map_err(failed("look at", &path))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(FolderError::NotAFile(path));
        }
        check_access(&found, &path, self.0.user)?;
        Ok(Some(file))
    }

    /// Makes a file of `len` bytes: `content`, then zeros. Under its name the file exists whole and durable,
    /// or not at all. An existing file with that name stays unchanged: another process was faster.
    ///
    /// All of its space is reserved and written beforehand, so that a later write within its length needs no
    /// more space:
    ///
    /// - File systems that overwrite in place (ext4, XFS and most others) keep that promise, with or without
    ///   `fallocate`.
    /// - On btrfs the file is exempt from copy-on-write, so the promise holds until a snapshot is taken.
    /// - ZFS and other file systems that copy each block on write promise nothing: a later write fails if the
    ///   disk is full. On them this only proves that the file could be written once.
    pub(crate) fn make_file(&self, name: &str, len: u64, content: &[u8]) -> Result<(), FolderError> {
        let path = self.named(name)?;
        let (file, temporary) = self.make_temporary(name, &path)?;
        self.fill(&file, &path, len, content)
            .and_then(|()| self.give_name(&temporary, name, &path))
            .inspect_err(|_| {
                let _ = self.remove_file(&temporary);
            })
    }

    /// Removes a file. A later sync makes the removal durable.
    pub(crate) fn remove_file(&self, name: &str) -> io::Result<()> {
        if !is_plain(name) {
            return Err(ErrorKind::InvalidInput.into());
        }
        Ok(rustix::fs::unlinkat(&self.0.folder, name, AtFlags::empty())?)
    }

    /// The names in the folder, without those that begin with a dot or are not UTF-8: no state file has such
    /// a name.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0.folder)? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok().filter(|name| !name.starts_with('.'));
            names.extend(name.map(str::to_owned));
        }
        Ok(names)
    }

    /// What the file system says about a file, if it exists.
    pub(super) fn status(&self, name: &str) -> Option<FileStatus> {
        let found = rustix::fs::statat(&self.0.folder, name, AtFlags::SYMLINK_NOFOLLOW);
        is_plain(name).then_some(found)?.ok().map(|found| FileStatus {
            number: found.st_ino,
            modified: time(found.st_mtime, found.st_mtime_nsec),
            changed: time(found.st_ctime, found.st_ctime_nsec),
        })
    }

    /// Whether `name` still refers to this open file.
    pub(crate) fn is_at(&self, file: &File, name: &str) -> bool {
        let place = |found: Stat| (found.st_dev, found.st_ino);
        let named = rustix::fs::statat(&self.0.folder, name, AtFlags::SYMLINK_NOFOLLOW).map(place);
        is_plain(name) && rustix::fs::fstat(file).map(place).is_ok_and(|opened| named == Ok(opened))
    }

    fn named(&self, name: &str) -> Result<PathBuf, FolderError> {
        if is_plain(name) {
            Ok(self.path().join(name))
        } else {
            Err(FolderError::Name(name.chars().take(80).collect()))
        }
    }

    /// Makes an empty file under a temporary name.
    fn make_temporary(&self, name: &str, path: &Path) -> Result<(File, String), FolderError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for number in 0..TEMPORARIES_MAX {
            let temporary = temporary_name(name, number);
            match rustix::fs::openat(&self.0.folder, &temporary, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => return Ok((file.into(), temporary)),
                // A killed process left it, or another process uses it: leave it alone.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(failed("make", path)(error)),
            }
        }
        Err(failed("make", path)(Errno::EXIST))
    }

    fn fill(&self, file: &File, path: &Path, len: u64, content: &[u8]) -> Result<(), FolderError> {
        let room = |error| FolderError::Room { path: path.to_owned(), len, error };
        if Storage::of(file).is_ok_and(|storage| storage == Storage::CopyOnWrite) {
            // This works only while the file is empty. Some file systems do not support it; then only the
            // writes below reserve space.
            let _ = rustix::fs::ioctl_getflags(file)
                .and_then(|flags| rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW));
        }
        file.set_len(len).map_err(room)?;
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(room(error.into())),
        }
        // Written even where the reservation holds: the first write into reserved blocks changes the file's
        // metadata, and so takes longer than later records.
        let zeros = [0; 4096];
        let mut at = 0;
        while at < len {
            let part = (len - at).min(zeros.len() as u64);
            #[expect(clippy::cast_possible_truncation, reason = "no more than the array's length")]
            file.write_all_at(&zeros[..part as usize], at).map_err(room)?;
            at += part;
        }
        file.write_all_at(content, 0).and_then(|()| file.sync_all()).map_err(room)
    }

    fn give_name(&self, temporary: &str, name: &str, path: &Path) -> Result<(), FolderError> {
        let folder = &self.0.folder;
        match rustix::fs::renameat_with(folder, temporary, folder, name, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => self.remove_file(temporary).map_err(|error| FolderError::Io {
                what: "remove a temporary file of",
                path: path.to_owned(),
                error,
            })?,
            Err(error) => return Err(failed("make", path)(error)),
        }
        sync(folder).map_err(failed("sync", self.path()))
    }
}

/// What shows that a file has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileStatus {
    number: u64,
    modified: SystemTime,
    changed: SystemTime,
}

impl FileStatus {
    /// When its content was changed last.
    pub(super) fn modified(&self) -> SystemTime {
        self.modified
    }

    /// When anything about it was changed last, by the clock of this host.
    pub(super) fn changed(&self) -> SystemTime {
        self.changed
    }
}

fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    let since = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) + Duration::from_nanos(nanoseconds);
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Whether this is the name of an entry in the folder, and not a path out of it.
fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

fn temporary_name(name: &str, number: u32) -> String {
    format!(".{name}.{}.{number}.new", process::id())
}

/// The most temporary files for one process and name at a time.
const TEMPORARIES_MAX: u32 = 256;

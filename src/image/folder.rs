//! The folder that an image arrives in, by its handle: if another folder takes its path meanwhile, that one
//! is never touched.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

/// An open folder. Names in the folder are plain: links are not followed.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    handle: Arc<OwnedFd>,
    /// As the operator named it; for messages only.
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at this path.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = Arc::new(rustix::fs::open(path, flags, Mode::empty())?);
        Ok(Self { handle, path: path.to_owned() })
    }

    /// The path of a file in it, for messages.
    pub(super) fn path(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// The metadata of this name's file, if it exists.
    pub(super) fn look(&self, name: &OsStr) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&*self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this name refers to an open file.
    pub(super) fn has(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let ours = rustix::fs::fstat(file)?;
        Ok(self.look(name)?.is_some_and(|found| (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)))
    }

    /// Opens a file for reading and writing; makes it, for its owner alone, if it is missing.
    pub(super) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        // Opening a pipe must not wait for its other end.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&*self.handle, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Renames a file, and replaces a file with the new name only if `replace` is set.
    pub(super) fn rename(&self, from: &OsStr, to: &OsStr, replace: bool) -> io::Result<()> {
        let (folder, plain) =
            (&*self.handle, || rustix::fs::renameat(&*self.handle, from, &*self.handle, to));
        let renamed = if replace {
            plain()
        } else {
            match rustix::fs::renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE) {
                // A file system such as NFS cannot check and rename in one step.
                Err(Errno::INVAL) if self.look(to)?.is_none() => plain(),
                Err(Errno::INVAL) => Err(Errno::EXIST),
                renamed => renamed,
            }
        };
        Ok(renamed?)
    }

    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&*self.handle, name, AtFlags::empty())?)
    }

    /// Makes the names in it durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        // The handle itself cannot be synced.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&*self.handle, ".", flags, Mode::empty())?;
        Ok(rustix::fs::fsync(folder)?)
    }
}

pub(super) fn is_file(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

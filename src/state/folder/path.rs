//! The walk to a folder, component by component, each opened relative to the one before and checked.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::access::{OTHERS_WRITE, check_access};
use super::durability::sync;
use super::error::{FolderError, failed};
use super::storage::{Storage, StorageCheck};

/// Opens a folder, and makes it if it is missing; returns its handle and its path from the root.
pub(super) fn open(path: &Path, check: StorageCheck, user: u32) -> Result<(OwnedFd, PathBuf), FolderError> {
    let whole = std::path::absolute(path).map_err(|error| FolderError::Io {
        what: "find",
        path: path.to_owned(),
        error,
    })?;
    let mut walk = Walk::start(&whole, user)?;
    while let Some(name) = walk.rest.pop() {
        walk.enter(name, check)?;
    }
    let found = rustix::fs::fstat(&walk.at).map_err(failed("look at", &whole))?;
    check_access(&found, &whole, user)?;
    // The walk needs search permission only; to sync and to list a folder takes more.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(&walk.at, ".", flags, Mode::empty()).map_err(failed("open", &whole))?;
    if check == StorageCheck::Refuse {
        Storage::of(&folder).map_err(failed("look at the file system of", &whole))?.check(&whole)?;
    }
    Ok((folder, whole))
}

struct Walk {
    at: OwnedFd,
    path: PathBuf,
    /// The components still to be entered, the next one last.
    rest: Vec<OsString>,
    links: u32,
    user: u32,
}

impl Walk {
    fn start(path: &Path, user: u32) -> Result<Self, FolderError> {
        let root = Path::new("/");
        let at = rustix::fs::open(root, ON_THE_WAY, Mode::empty()).map_err(failed("open", root))?;
        let mut walk = Self { at, path: root.to_owned(), rest: Vec::new(), links: 0, user };
        walk.push(path);
        Ok(walk)
    }

    fn push(&mut self, path: &Path) {
        let names =
            path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
        self.rest.extend(names.rev().map(|part| part.as_os_str().to_owned()));
    }

    /// Enters the next component: a folder, which may have to be made, or a link.
    fn enter(&mut self, name: OsString, check: StorageCheck) -> Result<(), FolderError> {
        self.check_above()?;
        let path = if name == ".." {
            self.path.parent().unwrap_or(&self.path).to_owned()
        } else {
            self.path.join(&name)
        };
        match rustix::fs::openat(&self.at, &name, ON_THE_WAY, Mode::empty()) {
            Ok(folder) => {
                // The process that made it may have been killed before it made the entry durable.
                if self.rest.is_empty() {
                    let _ = self.sync();
                }
                (self.at, self.path) = (folder, path);
                Ok(())
            }
            Err(Errno::NOENT) => self.make(name, &path, check),
            Err(Errno::NOTDIR | Errno::LOOP) => self.follow(&name, path),
            Err(error) => Err(failed("open", &path)(error)),
        }
    }

    fn make(&mut self, name: OsString, path: &Path, check: StorageCheck) -> Result<(), FolderError> {
        if check == StorageCheck::Refuse {
            Storage::of(&self.at).map_err(failed("look at the file system of", path))?.check(path)?;
        }
        match rustix::fs::mkdirat(&self.at, &name, Mode::RWXU) {
            // Another process was faster, and may not have synced the entry yet.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("make", path)(error)),
        }
        self.sync().map_err(failed("sync", &self.path))?;
        self.rest.push(name);
        Ok(())
    }

    fn follow(&mut self, name: &OsString, path: PathBuf) -> Result<(), FolderError> {
        // One handle, so that the owner and the target belong to the same link.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let link = rustix::fs::openat(&self.at, name, flags, Mode::empty()).map_err(failed("open", &path))?;
        let found = rustix::fs::fstat(&link).map_err(failed("look at", &path))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Symlink {
            return Err(FolderError::NotAFolder(path));
        }
        if self.rest.is_empty() {
            return Err(FolderError::Link(path));
        }
        self.check_owner(&found, &path)?;
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(failed("follow", &path)(Errno::LOOP));
        }
        let target = rustix::fs::readlinkat(&link, "", Vec::new()).map_err(failed("follow", &path))?;
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            let root = Path::new("/");
            self.at = rustix::fs::open(root, ON_THE_WAY, Mode::empty()).map_err(failed("open", root))?;
            self.path = root.to_owned();
        }
        self.push(&target);
        Ok(())
    }

    /// Checks that other users cannot replace the entry that is looked up next in the current folder.
    fn check_above(&self) -> Result<(), FolderError> {
        let found = rustix::fs::fstat(&self.at).map_err(failed("look at", &self.path))?;
        self.check_owner(&found, &self.path)?;
        let sticky = found.st_mode & STICKY != 0;
        if found.st_mode & OTHERS_WRITE != 0 && !sticky {
            return Err(FolderError::Writable { path: self.path.clone(), mode: found.st_mode & 0o7777 });
        }
        Ok(())
    }

    fn check_owner(&self, found: &Stat, path: &Path) -> Result<(), FolderError> {
        if found.st_uid == 0 || found.st_uid == self.user {
            return Ok(());
        }
        Err(FolderError::Owner { path: path.to_owned(), owner: found.st_uid, user: self.user })
    }

    fn sync(&self) -> Result<(), Errno> {
        // The walk's handle cannot be synced.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        sync(&rustix::fs::openat(&self.at, ".", flags, Mode::empty())?)
    }
}

/// Search permission suffices to pass through a folder.
const ON_THE_WAY: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Only the owner of an entry, or of the folder, may remove or rename it.
const STICKY: u32 = 0o1000;

/// The kernel's own limit.
const LINKS_MAX: u32 = 40;

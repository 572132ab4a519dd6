//! Where an image is stored: the place that the operator named, and the partial file beside it.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::blocks::digests;
use super::error::StoreError;
use super::extents::gaps;
use super::folder::{Folder, is_file};
use crate::digest::Digest;
use crate::memory::{PAGE_BYTES, PAGE_LEN, RamLayout};
use crate::wire::{FILE_NAME_MAX, ImageOffer, Refusal};

/// The suffix of an incomplete file's name. It must not occur in other names, because such a file is
/// overwritten.
const PARTIAL: &str = ".sterna-partial";

/// How often to open a partial file that another receiver finishes at the same moment.
const OPEN_TRIES: usize = 8;

/// The place for an image that arrives.
#[derive(Clone, Debug)]
pub struct Store {
    place: Place,
    replace: bool,
}

#[derive(Clone, Debug)]
enum Place {
    File(Folder, OsString),
    /// In this folder, under the source's name for the file, if that is a plain name.
    Folder(Folder),
}

impl Store {
    /// The file `into`, or a file in it if it is a folder. `replace` allows to replace an existing file.
    ///
    /// # Errors
    /// [`StoreError::Into`] if the folder is missing, or a file exists that is not to be replaced.
    pub fn new(into: &Path, replace: bool) -> Result<Self, StoreError> {
        let unusable =
            |reason: &dyn Display| StoreError::Into { path: into.to_owned(), reason: reason.to_string() };
        match Folder::open(into) {
            Ok(folder) => return Ok(Self { place: Place::Folder(folder), replace }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(unusable(&error)),
        }
        let Some(name) = into.file_name().filter(|_| !into.as_os_str().as_encoded_bytes().ends_with(b"/"))
        else {
            return Err(unusable(&"the folder does not exist"));
        };
        if name.as_encoded_bytes().ends_with(PARTIAL.as_bytes()) {
            return Err(unusable(&"such a name is that of a file which is not whole yet"));
        }
        let folder = Folder::open(folder_of(into)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => unusable(&"its folder does not exist"),
            _ => unusable(&format_args!("its folder cannot be opened: {error}")),
        })?;
        match folder.look(name).map_err(|error| unusable(&error))? {
            Some(there) if !is_file(&there) => Err(unusable(&"the path exists and is not a regular file")),
            Some(_) if !replace => Err(StoreError::Exists { path: into.to_owned() }),
            _ => Ok(Self { place: Place::File(folder, name.to_owned()), replace }),
        }
    }

    /// Where to store a file that the source calls `name`.
    fn target(&self, name: &str) -> Result<(Folder, OsString), Refusal> {
        match &self.place {
            Place::File(folder, name) => Ok((folder.clone(), name.clone())),
            Place::Folder(folder) => match plain_name(name) {
                Some(name) => Ok((folder.clone(), name.into())),
                None => Err(Refusal::Image(format!("{name:?} is not the plain name of a file"))),
            },
        }
    }
}

/// The name, if it cannot lead out of the folder and leaves space for the suffix of a partial file.
fn plain_name(name: &str) -> Option<&str> {
    let plain = !name.is_empty()
        && name != "."
        && name != ".."
        && name.len() + PARTIAL.len() <= FILE_NAME_MAX
        && !name.ends_with(PARTIAL)
        && !name.contains(|character: char| character == '/' || character.is_control());
    plain.then_some(name)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// A file that is not complete yet.
#[derive(Debug)]
pub(super) struct Partial {
    file: File,
    folder: Folder,
    /// Its present name, and its final one.
    name: OsString,
    target: OsString,
    /// Its path, for messages.
    path: PathBuf,
    replace: bool,
    len_bytes: u64,
    /// Whether it may hold data from an earlier attempt.
    pub(super) held: bool,
}

impl Partial {
    /// Opens or makes the file, once it is clear that it can be stored: under its name, in the available
    /// space, and by a transport that pins memory only where files are in memory.
    pub(super) fn open(store: &Store, offer: &ImageOffer, pins_memory: bool) -> Result<Self, StoreError> {
        let (folder, target) = store.target(&offer.name)?;
        check_target(&folder, &target, store.replace)?;
        let mut name = target.clone();
        name.push(PARTIAL);
        let path = folder.path(&name);
        let (file, metadata) = open_locked(&folder, &name)?;
        // Checked again, now that no other receiver can be about to give this file its name.
        check_target(&folder, &target, store.replace)?;
        let held = metadata.len() > 0;
        let (replace, len_bytes) = (store.replace, offer.len_bytes);
        let partial = Self { file, folder, name, target, path, replace, len_bytes, held };
        partial
            .check_file_system(offer, pins_memory, metadata.blocks() * 512)
            .inspect_err(|_| partial.abandon_if_empty())?;
        Ok(partial)
    }

    /// Refuses early what would fail late.
    fn check_file_system(
        &self,
        offer: &ImageOffer,
        pins_memory: bool,
        allocated_bytes: u64,
    ) -> Result<(), Refusal> {
        let failed = |error: Errno| refused("look at the file system of", &self.path)(error.into());
        let kind = rustix::fs::fstatfs(&self.file).map_err(failed)?.f_type;
        let space = rustix::fs::fstatvfs(&self.file).map_err(failed)?;
        let huge = kind == libc::HUGETLBFS_MAGIC;
        if huge && !offer.len_bytes.is_multiple_of(space.f_bsize) {
            let pages = space.f_bsize >> 10;
            return Err(Refusal::Image(format!("its length is not in whole huge pages of {pages} KiB")));
        }
        let pinned = offer.content.as_ref().filter(|_| pins_memory);
        if pinned.is_some() && !huge && kind != libc::TMPFS_MAGIC {
            return Err(Refusal::Transport(format!(
                "{} is on a disk, and Linux lets RDMA write only to files in memory (/dev/shm, hugetlbfs)",
                self.path.display()
            )));
        }
        // Pinned memory takes space, including holes.
        let needed = pinned.map_or(offer.data_bytes, |content| content.parts.total_bytes());
        let available_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        // A hugetlbfs without a size of its own reports nothing.
        if space.f_blocks > 0 && needed > available_bytes.saturating_add(allocated_bytes) {
            let needed_bytes = needed.saturating_sub(allocated_bytes);
            return Err(Refusal::Space { needed_bytes, available_bytes });
        }
        Ok(())
    }

    /// Sets the file's length, in whole pages, punches the holes that it must have, and maps it.
    pub(super) fn map(&mut self, parts: &RamLayout) -> Result<Arc<MmapRaw>, StoreError> {
        let end = self.len_bytes.next_multiple_of(PAGE_BYTES);
        self.set_len(end)?;
        if self.held && !self.punch_all(gaps(parts, end))? {
            // The file system cannot punch holes: start with an empty file.
            self.set_len(0)?;
            self.set_len(end)?;
            self.held = false;
        }
        let len = usize::try_from(end).unwrap_or(usize::MAX);
        let mapping = MmapOptions::new().len(len).map_raw(&self.file);
        Ok(Arc::new(mapping.map_err(|error| self.failed("map", error))?))
    }

    /// Turns the whole file into a hole.
    pub(super) fn clear(&self) -> Result<(), StoreError> {
        self.set_len(0)?;
        self.set_len(self.len_bytes)
    }

    /// The digests of its data.
    pub(super) fn digests(&self, parts: &RamLayout) -> Result<Vec<Digest>, StoreError> {
        digests(&self.file, parts, |_, _| Ok(())).map_err(|error| self.failed("read", error))
    }

    /// The same, and turns zero pages into holes: RDMA fills holes when memory is registered.
    pub(super) fn digests_and_holes(&self, parts: &RamLayout) -> Result<Vec<Digest>, StoreError> {
        let look = |at: u64, block: &[u8]| {
            let mut zeros = 0;
            for (page, end) in block.chunks(PAGE_LEN).zip((at..).step_by(PAGE_LEN)) {
                if page.iter().all(|&byte| byte == 0) {
                    zeros += PAGE_BYTES;
                    continue;
                }
                self.punch(end - zeros, zeros)?;
                zeros = 0;
            }
            self.punch(at + block.len() as u64 - zeros, zeros).map(drop)
        };
        digests(&self.file, parts, look).map_err(|error| self.failed("read", error))
    }

    /// Finishes a complete file: its length to the byte, its data durable, under its final name.
    pub(super) fn finish(self) -> Result<PathBuf, StoreError> {
        self.set_len(self.len_bytes)?;
        self.file.sync_all().map_err(|error| self.failed("write out", error))?;
        let target = self.folder.path(&self.target);
        self.rename().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Refusal::FileExists(target.display().to_string()).into(),
            _ => self.failed("rename", error),
        })?;
        // The file has its name. That the name may not survive a power failure is no reason to report it
        // missing.
        if let Err(error) = self.folder.sync() {
            tracing::warn!(
                "{} is stored, but its folder could not be written out: {error}",
                target.display()
            );
        }
        Ok(target)
    }

    fn rename(&self) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "another process removed it meanwhile");
        if !self.folder.has(&self.name, &self.file)? {
            return Err(gone());
        }
        self.folder.rename(&self.name, &self.target, self.replace)?;
        // A process with write access to the folder could have replaced the file in between.
        if self.folder.has(&self.target, &self.file)? { Ok(()) } else { Err(gone()) }
    }

    /// Removes the file with its data: a device may still write to its pages.
    pub(super) fn discard(&self) {
        self.remove();
    }

    fn remove(&self) {
        let is_ours = self.folder.has(&self.name, &self.file).unwrap_or(false);
        if is_ours && let Err(error) = self.folder.remove(&self.name) {
            tracing::warn!("{} stays: {error}", self.path.display());
        }
    }

    /// Removes the file if no data arrived.
    pub(super) fn abandon_if_empty(&self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.blocks() == 0) {
            self.remove();
        }
    }

    /// Whether its file system is full.
    pub(super) fn is_full(&self) -> bool {
        rustix::fs::fstatvfs(&self.file)
            .is_ok_and(|space| space.f_blocks > 0 && space.f_bavail.saturating_mul(space.f_frsize) < 1 << 20)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Punches holes; `false` if the file system cannot.
    fn punch_all(&self, mut holes: impl Iterator<Item = std::ops::Range<u64>>) -> Result<bool, StoreError> {
        holes
            .try_fold(true, |all, hole| Ok(all && self.punch(hole.start, hole.end - hole.start)?))
            .map_err(|error| self.failed("make holes in", error))
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, mode, at, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn set_len(&self, len_bytes: u64) -> Result<(), StoreError> {
        self.file.set_len(len_bytes).map_err(|error| self.failed("set the length of", error))
    }

    fn failed(&self, what: &'static str, error: io::Error) -> StoreError {
        StoreError::File { what, path: self.path.clone(), error }
    }
}

/// Refuses a target that exists and is not to be replaced.
fn check_target(folder: &Folder, name: &OsStr, replace: bool) -> Result<(), Refusal> {
    let target = folder.path(name);
    match folder.look(name).map_err(refused("look at", &target))? {
        Some(there) if !is_file(&there) => {
            Err(Refusal::Image(format!("{} exists and is not a regular file", target.display())))
        }
        Some(_) if !replace => Err(Refusal::FileExists(target.display().to_string())),
        _ => Ok(()),
    }
}

/// Opens or makes a partial file that is this user's and this receiver's alone: memory holds secrets.
fn open_locked(folder: &Folder, name: &OsStr) -> Result<(File, Metadata), Refusal> {
    let path = &folder.path(name);
    let failed = |what| refused(what, path);
    let user = fs::metadata("/proc/self").map_err(failed("tell whose is"))?.uid();
    for _ in 0..OPEN_TRIES {
        let file = folder.open_file(name).map_err(failed("open"))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => Refusal::Image(format!("another process is receiving {}", path.display())),
            error => failed("lock")(error.into()),
        })?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        if !metadata.is_file() || metadata.uid() != user || metadata.nlink() > 1 {
            return Err(Refusal::Image(format!(
                "{} is another user's, has a second name or is no regular file: remove it",
                path.display()
            )));
        }
        if !folder.has(name, &file).map_err(failed("look at"))? {
            // Its last holder renamed or removed it between our opening and locking it.
            continue;
        }
        if metadata.mode() & 0o077 != 0 {
            // Other processes may have it open. A new file is private.
            folder.remove(name).map_err(failed("remove"))?;
            continue;
        }
        return Ok((file, metadata));
    }
    Err(Refusal::Image(format!("{} comes and goes; is another process receiving it?", path.display())))
}

/// The refusal for a source when the system fails before anything was sent.
fn refused<'path>(what: &'static str, path: &'path Path) -> impl Fn(io::Error) -> Refusal + 'path {
    move |error| Refusal::Image(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_peer_names_a_file_and_never_a_path() {
        let long = "x".repeat(241);
        for name in [
            "",
            ".",
            "..",
            "x.sterna-partial",
            "/",
            "../x",
            "../../x",
            "/etc/passwd",
            "a/b",
            "a\0b",
            "a\nb",
            &long,
        ] {
            assert_eq!(plain_name(name), None, "{name:?}");
        }
        for name in ["memory", "..memory", "a b.img", "möwe", &long[1..]] {
            assert_eq!(plain_name(name), Some(name));
        }
    }

    #[test]
    fn what_cannot_be_received_into_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("there"), "x").unwrap();
        std::os::unix::fs::symlink(path("there"), path("link")).unwrap();
        assert!(Store::new(&path("new"), false).is_ok());
        assert!(Store::new(folder.path(), false).is_ok());
        assert!(Store::new(&path("there"), true).is_ok());
        for (name, replace) in
            [("there", false), ("link", true), ("none/new", false), ("new/", false), ("none/..", false)]
        {
            let error = Store::new(&path(name), replace).unwrap_err();
            assert!(matches!(error, StoreError::Into { .. } | StoreError::Exists { .. }), "{error}");
        }
        assert!(Store::new(Path::new("/dev/null"), true).is_err());
    }

    fn offer(name: &str) -> ImageOffer {
        let attempt_id = crate::wire::AttemptId([0; 16]);
        ImageOffer { attempt_id, name: name.into(), len_bytes: 5000, data_bytes: 0, content: None }
    }

    #[test]
    fn a_partial_file_is_one_receivers_alone_and_goes_if_nothing_arrived() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), false).unwrap();
        let partial = Partial::open(&store, &offer("tern"), false).unwrap();
        let error = Partial::open(&store, &offer("tern"), false).unwrap_err();
        assert!(matches!(error, StoreError::Refused(Refusal::Image(_))), "{error}");
        assert!(partial.path().ends_with("tern.sterna-partial") && partial.path().exists());
        partial.abandon_if_empty();
        assert!(!folder.path().join("tern.sterna-partial").exists());
    }

    #[test]
    fn a_partial_file_is_believed_only_if_nobody_else_can_have_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), false).unwrap();
        let path = folder.path().join("tern.sterna-partial");
        fs::write(&path, "from before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Partial::open(&store, &offer("tern"), false).unwrap().held);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let partial = Partial::open(&store, &offer("tern"), false).unwrap();
        assert!(!partial.held, "what others may have open is not gone on with");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        drop(partial);
        fs::hard_link(&path, folder.path().join("second")).unwrap();
        assert!(Partial::open(&store, &offer("tern"), false).is_err());
    }

    #[test]
    fn what_was_taken_away_meanwhile_gets_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), false).unwrap();
        let partial = Partial::open(&store, &offer("tern"), false).unwrap();
        fs::remove_file(partial.path()).unwrap();
        fs::write(partial.path(), "another's").unwrap();
        assert!(partial.finish().is_err());
        assert!(!folder.path().join("tern").exists());
    }

    #[test]
    fn a_link_in_the_place_of_a_partial_file_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("other"), "untouched").unwrap();
        std::os::unix::fs::symlink(folder.path().join("other"), folder.path().join("tern.sterna-partial"))
            .unwrap();
        let store = Store::new(folder.path(), true).unwrap();
        assert!(Partial::open(&store, &offer("tern"), false).is_err());
        assert_eq!(fs::read(folder.path().join("other")).unwrap(), b"untouched");
    }

    #[test]
    fn a_folder_in_the_place_of_the_one_that_was_named_is_not_touched() {
        let root = tempfile::tempdir().unwrap();
        let (named, victim, moved) =
            (root.path().join("named"), root.path().join("victim"), root.path().join("moved"));
        for as_file in [false, true] {
            fs::create_dir(&named).unwrap();
            fs::create_dir(&victim).unwrap();
            fs::write(victim.join("tern"), "untouched").unwrap();
            fs::write(victim.join("tern.sterna-partial"), "untouched").unwrap();
            let into = if as_file { named.join("tern") } else { named.clone() };
            let store = Store::new(&into, true).unwrap();
            let swap = || {
                fs::rename(&named, &moved).unwrap();
                std::os::unix::fs::symlink(&victim, &named).unwrap();
            };
            // Before the file comes, and while it arrives.
            if as_file {
                swap();
            }
            let partial = Partial::open(&store, &offer("tern"), false).unwrap();
            if !as_file {
                swap();
            }
            partial.clear().unwrap();
            partial.finish().unwrap();
            assert_eq!(fs::metadata(moved.join("tern")).unwrap().len(), 5000);
            for name in ["tern", "tern.sterna-partial"] {
                assert_eq!(fs::read(victim.join(name)).unwrap(), b"untouched");
            }
            let given_up = Partial::open(&store, &offer("tern"), false).unwrap();
            given_up.discard();
            assert!(victim.join("tern.sterna-partial").exists());
            fs::remove_file(&named).unwrap();
            fs::remove_dir_all(&victim).unwrap();
            fs::remove_dir_all(&moved).unwrap();
        }
    }

    #[test]
    fn a_file_that_came_in_between_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), false).unwrap();
        let partial = Partial::open(&store, &offer("tern"), false).unwrap();
        partial.clear().unwrap();
        fs::write(folder.path().join("tern"), "another").unwrap();
        assert!(matches!(partial.finish(), Err(StoreError::Refused(Refusal::FileExists(_)))));
        assert_eq!(fs::read(folder.path().join("tern")).unwrap(), b"another");
    }
}

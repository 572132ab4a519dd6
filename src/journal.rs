//! Journals on disk: what a host must not forget of the guests it gave away or took in. What a record means, and its bytes, are the
//! business of [`handover`](crate::handover).
//!
//! A journal is a file of a guest and a side, `NAME.source.journal` or `NAME.destination.journal`. All of its space is reserved and
//! its head durable before anything depends on it; whoever writes to it holds a lock on it, so two processes never share one.
//!
//! A journal in which nothing was ever recorded goes when it is closed, so attempts that come to nothing leave nothing behind. One
//! with a record stays: its last word may be asked for, and no host knows of the other that it will not be. That is 136 KiB for each
//! name of a guest that was once ready to change hands; an operator may remove it where nobody is in doubt about that guest.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, RenameFlags};
use thiserror::Error;

use crate::handover::{BootId, JOURNAL_LEN, Journal, JournalError, Mark, Record, Side, WRITE_LEN};
use crate::lock::is_at;
use crate::wire::{Epoch, NAME_MAX};

/// Where the journals of a host are.
#[derive(Clone, Debug)]
pub struct Journals(Place);

#[derive(Clone, Debug)]
enum Place {
    Folder(PathBuf),
    Memory(Memory),
}

/// The journals of a process that keeps none on disk; a name that is there with `None` is in use.
type Memory = Arc<Mutex<HashMap<(String, Side), Option<Journal>>>>;

/// Why a journal cannot be kept or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JournalsError {
    /// A guest's name that can be no file's.
    #[error("`{0}` cannot be the name of a journal: a guest's name may not contain `/` or begin with `.`")]
    Name(String),
    /// Another process, or another migration of this one, writes to it.
    #[error(
        "the journal {0} is in use by another process that holds this guest, or takes it in: let that end first"
    )]
    InUse(PathBuf),
    /// It is not what it should be.
    #[error(
        "the journal {path} cannot be gone by: {error}. Find out where the guest is, then move the file away"
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: JournalError,
    },
    /// The file system refused.
    #[error(
        "cannot {what} the journal {path}: {error}; it needs a folder on a disk that this user may write to, and 136 KiB there"
    )]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file, or its folder.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

impl Default for Journals {
    /// [`Self::in_memory`].
    fn default() -> Self {
        Self::in_memory()
    }
}

impl Journals {
    /// Files in this folder, which is made when the first of them is. It must outlive a restart of the host, and be on no file
    /// system that another host uses too.
    #[must_use]
    pub fn in_folder(path: impl Into<PathBuf>) -> Self {
        Self(Place::Folder(path.into()))
    }

    /// What is recorded lasts as long as this value and its clones: no longer than the process. So a host or a process that dies
    /// at the wrong moment leaves a doubt that only an operator can settle.
    #[must_use]
    pub fn in_memory() -> Self {
        Self(Place::Memory(Memory::default()))
    }

    /// Makes the folder, so that it is known early that it can be used.
    ///
    /// # Errors
    /// [`JournalsError::Io`].
    pub fn prepare(&self) -> Result<(), JournalsError> {
        let Place::Folder(folder) = &self.0 else { return Ok(()) };
        make_folder(folder)?;
        // Nothing is written to it: whether anything can be, only a file tells.
        let probe = folder.join(format!(".{}.probe", process::id()));
        let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&probe);
        made.map_err(failed("write to the folder of", folder))?;
        fs::remove_file(&probe).map_err(failed("write to the folder of", folder))
    }

    /// Opens the journal of a guest on one side for writing, and makes it if there is none.
    ///
    /// # Errors
    /// [`JournalsError`]; nothing may be handed over then.
    pub fn open(&self, name: &str, side: Side) -> Result<OpenJournal, JournalsError> {
        let boot = boot_id()?;
        let mut record_time = Duration::ZERO;
        let (journal, keeper) = match &self.0 {
            Place::Folder(folder) => {
                let path = folder.join(file_name(name, side)?);
                make_folder(folder)?;
                let file = open_locked(folder, &path, side)?;
                let journal = read(&file, &path, side)?;
                // The head stays what it is, and is as long as a record.
                let began = Instant::now();
                write(&file, &Journal::head(side), 0).map_err(failed("write to", &path))?;
                record_time = began.elapsed();
                (journal, Keeper::File { file, path })
            }
            Place::Memory(memory) => {
                let key = (name.to_owned(), side);
                let kept = lock(memory).insert(key.clone(), None);
                let journal = match kept {
                    None => Journal::empty(side),
                    Some(Some(journal)) => journal,
                    Some(None) => return Err(JournalsError::InUse(file_name(name, side)?.into())),
                };
                (journal, Keeper::Memory(memory.clone(), key))
            }
        };
        Ok(OpenJournal { journal, keeper, boot, record_time, unsure: false })
    }

    /// Reads the journal of a guest on one side, also while a process writes to it; `None` if there is none.
    ///
    /// # Errors
    /// [`JournalsError`].
    pub fn look(&self, name: &str, side: Side) -> Result<Option<Journal>, JournalsError> {
        match &self.0 {
            Place::Folder(folder) => {
                let path = folder.join(file_name(name, side)?);
                match options().write(false).open(&path) {
                    Ok(file) => read(&file, &path, side).map(Some),
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(failed("open", &path)(error)),
                }
            }
            Place::Memory(memory) => Ok(lock(memory).get(&(name.to_owned(), side)).cloned().flatten()),
        }
    }

    /// The guest whose journal, on this side, has a word of this attempt, and the last of them. Journals that cannot be read say
    /// nothing.
    #[must_use]
    pub fn find(&self, epoch: Epoch, side: Side) -> Option<(String, Record)> {
        self.names(side).into_iter().find_map(|name| {
            let journal = self.look(&name, side).unwrap_or_else(|error| {
                tracing::warn!("{error}");
                None
            });
            let record = journal?.of(epoch).cloned()?;
            Some((name, record))
        })
    }

    fn names(&self, side: Side) -> Vec<String> {
        match &self.0 {
            Place::Folder(folder) => {
                let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
                let named = |name: &OsStr| Some(name.to_str()?.strip_suffix(&suffix(side))?.to_owned());
                entries.flatten().filter_map(|entry| named(&entry.file_name())).collect()
            }
            Place::Memory(memory) => {
                lock(memory).keys().filter(|(_, of)| *of == side).map(|(name, _)| name.clone()).collect()
            }
        }
    }
}

/// A journal that this process writes to, and no other.
#[derive(Debug)]
pub struct OpenJournal {
    journal: Journal,
    keeper: Keeper,
    boot: BootId,
    record_time: Duration,
    /// A record could not be written, and may be there all the same.
    unsure: bool,
}

#[derive(Debug)]
enum Keeper {
    File {
        file: File,
        path: PathBuf,
    },
    Memory(Memory, (String, Side)),
    /// A disk that fails at these marks.
    #[cfg(test)]
    Failing(Vec<Mark>),
}

impl OpenJournal {
    /// A journal that cannot be written when it comes to these marks.
    #[cfg(test)]
    pub(crate) fn failing(side: Side, marks: &[Mark]) -> Self {
        Self {
            journal: Journal::empty(side),
            keeper: Keeper::Failing(marks.to_owned()),
            boot: BootId([0; 16]),
            record_time: Duration::ZERO,
            unsure: false,
        }
    }

    /// What it says.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// How long a record takes: what writing as much took when it was opened.
    #[must_use]
    pub fn record_time(&self) -> Duration {
        self.record_time
    }

    /// Writes a record, and returns once it is durable.
    ///
    /// # Errors
    /// [`JournalsError`]; whether the record is there then, nobody knows.
    pub fn append(&mut self, mark: Mark, epoch: Epoch, peer: &str) -> Result<(), JournalsError> {
        let record = Record { mark, epoch, boot: self.boot, peer: peer.to_owned() };
        match &self.keeper {
            Keeper::File { file, path } => {
                let (at, bytes) = self
                    .journal
                    .write(&record)
                    .map_err(|error| JournalsError::Content { path: path.clone(), error })?;
                self.unsure = true;
                write(file, &bytes, at).map_err(failed("write to", path))?;
            }
            Keeper::Memory(..) => {}
            #[cfg(test)]
            Keeper::Failing(marks) if marks.contains(&mark) => {
                let error = io::Error::from(ErrorKind::StorageFull);
                return Err(JournalsError::Io { what: "write to", path: "test".into(), error });
            }
            #[cfg(test)]
            Keeper::Failing(_) => {}
        }
        self.unsure = false;
        self.journal.add(record);
        Ok(())
    }
}

impl Drop for OpenJournal {
    fn drop(&mut self) {
        let says_nothing = self.journal.records().is_empty() && !self.unsure;
        match &self.keeper {
            Keeper::Memory(memory, key) if says_nothing => drop(lock(memory).remove(key)),
            Keeper::Memory(memory, key) => {
                lock(memory).insert(key.clone(), Some(self.journal.clone()));
            }
            // While it is locked: whoever waits for the lock makes another. The lock goes with the descriptor.
            Keeper::File { file, path } if says_nothing && is_at(file, path) => {
                if let Err(error) = fs::remove_file(path) {
                    tracing::warn!("the journal {} is empty and stays: {error}", path.display());
                }
            }
            Keeper::File { .. } => {}
            #[cfg(test)]
            Keeper::Failing(_) => {}
        }
    }
}

fn lock(
    memory: &Mutex<HashMap<(String, Side), Option<Journal>>>,
) -> MutexGuard<'_, HashMap<(String, Side), Option<Journal>>> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

fn suffix(side: Side) -> String {
    format!(".{side}.journal")
}

fn file_name(name: &str, side: Side) -> Result<String, JournalsError> {
    let plain = !name.is_empty() && name.len() <= NAME_MAX && !name.starts_with('.');
    if plain && !name.contains(['/', '\0']) {
        Ok(format!("{name}{}", suffix(side)))
    } else {
        Err(JournalsError::Name(name.chars().take(80).collect()))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalsError {
    let path = path.to_owned();
    move |error| JournalsError::Io { what, path, error }
}

fn make_folder(folder: &Path) -> Result<(), JournalsError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed("make a folder for", folder))
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // A journal that is not a plain file of ours is not opened by way of a link, and does not make us wait.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).mode(0o600).custom_flags(flags.bits().cast_signed());
    options
}

/// Opens the file and locks it; makes it if there is none.
fn open_locked(folder: &Path, path: &Path, side: Side) -> Result<File, JournalsError> {
    // Whoever removes or replaces it meanwhile does so a few times, not for ever.
    for _ in 0..8 {
        let file = match options().open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make(folder, path, side)?;
                continue;
            }
            Err(error) => return Err(failed("open", path)(error)),
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(JournalsError::InUse(path.to_owned()));
        }
        if is_at(&file, path) {
            return Ok(file);
        }
    }
    Err(JournalsError::InUse(path.to_owned()))
}

/// Makes an empty journal: under its name it is there whole, or not at all.
fn make(folder: &Path, path: &Path, side: Side) -> Result<(), JournalsError> {
    let temporary = path.with_extension(format!("{}.new", process::id()));
    let made = (|| {
        let file = options().create(true).truncate(true).open(&temporary)?;
        // Disk space for all records that there will be at a time.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, JOURNAL_LEN as u64)?;
        file.write_all_at(&Journal::head(side), 0)?;
        file.sync_all()?;
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, &temporary, cwd, path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            // Another process was quicker.
            Err(rustix::io::Errno::EXIST) => fs::remove_file(&temporary)?,
            Err(error) => return Err(error.into()),
        }
        File::open(folder)?.sync_all()
    })();
    made.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed("make", path)(error)
    })
}

/// Writes to it, and returns once that is durable.
fn write(file: &File, bytes: &[u8; WRITE_LEN], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, at)?;
    file.sync_data()
}

fn read(file: &File, path: &Path, side: Side) -> Result<Journal, JournalsError> {
    let content = |error| JournalsError::Content { path: path.to_owned(), error };
    let found = file.metadata().map_err(failed("read", path))?;
    if !found.is_file() || found.len() != JOURNAL_LEN as u64 {
        return Err(content(JournalError::Foreign));
    }
    let mut bytes = vec![0; JOURNAL_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(failed("read", path))?;
    Journal::read(&bytes, side).map_err(content)
}

/// Which start of this host it is.
fn boot_id() -> Result<BootId, JournalsError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text =
        fs::read_to_string(path).map_err(failed("name this start of the host, from /proc, in", path))?;
    let foreign = || io::Error::from(ErrorKind::InvalidData);
    BootId::parse(&text).ok_or_else(|| failed("name this start of the host, from /proc, in", path)(foreign()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const EPOCH: Epoch = Epoch([1; 16]);

    fn folder() -> (tempfile::TempDir, Journals) {
        let folder = tempfile::tempdir().unwrap();
        let journals = Journals::in_folder(folder.path().join("state"));
        (folder, journals)
    }

    #[test]
    fn what_is_appended_is_there_for_whoever_opens_it_next() {
        let (_folder, files) = folder();
        for journals in [files, Journals::in_memory()] {
            assert!(journals.look("tern", Side::Source).unwrap().is_none());
            let mut open = journals.open("tern", Side::Source).unwrap();
            open.append(Mark::Committed, EPOCH, "host-b:7837").unwrap();
            open.append(Mark::Done, EPOCH, "host-b:7837").unwrap();
            drop(open);
            let again = journals.open("tern", Side::Source).unwrap();
            let marks: Vec<_> = again.journal().records().iter().map(|record| record.mark).collect();
            assert_eq!(marks, [Mark::Committed, Mark::Done]);
            assert_eq!(again.journal().last().unwrap().peer, "host-b:7837");
            drop(again);
            assert_eq!(journals.find(EPOCH, Side::Source).unwrap().0, "tern");
            assert!(journals.find(EPOCH, Side::Destination).is_none());
            assert!(journals.find(Epoch([2; 16]), Side::Source).is_none());
        }
    }

    #[test]
    fn how_long_a_record_takes_is_known_before_there_is_one_and_costs_none() {
        let (_folder, files) = folder();
        let mut open = files.open("tern", Side::Source).unwrap();
        assert!(open.record_time() > Duration::ZERO);
        open.append(Mark::Committed, EPOCH, "host-b:7837").unwrap();
        drop(open);
        let again = files.open("tern", Side::Source).unwrap();
        assert!(again.record_time() > Duration::ZERO);
        assert_eq!(files.look("tern", Side::Source).unwrap().as_ref(), Some(again.journal()));
        assert_eq!(again.journal().records().len(), 1);
        let memory = Journals::in_memory().open("tern", Side::Source).unwrap();
        assert_eq!(memory.record_time(), Duration::ZERO);
    }

    #[test]
    fn one_that_says_nothing_goes_when_it_is_closed_and_one_with_a_word_stays() {
        let (folder, files) = folder();
        let path = |name: &str| folder.path().join("state").join(format!("{name}.source.journal"));
        for journals in [files, Journals::in_memory()] {
            drop(journals.open("tern", Side::Source).unwrap());
            assert!(journals.look("tern", Side::Source).unwrap().is_none());
            assert!(!path("tern").exists());
            journals.open("gull", Side::Source).unwrap().append(Mark::Done, EPOCH, "").unwrap();
            drop(journals.open("gull", Side::Source).unwrap());
            assert_eq!(journals.find(EPOCH, Side::Source).unwrap().0, "gull");
            // Nobody knows what a write that failed has left on the disk.
            let mut open = journals.open("auk", Side::Source).unwrap();
            open.unsure = true;
            drop(open);
            assert!(journals.look("auk", Side::Source).unwrap().is_some());
        }
        // Only what it made itself: the file was moved away, and there is another of that name.
        let journals = Journals::in_folder(folder.path().join("state"));
        let open = journals.open("tern", Side::Source).unwrap();
        fs::remove_file(path("tern")).unwrap();
        fs::write(path("tern"), b"another").unwrap();
        drop(open);
        assert_eq!(fs::read(path("tern")).unwrap(), b"another");
    }

    #[test]
    fn two_do_not_write_to_one_journal() {
        let (_folder, files) = folder();
        for journals in [files, Journals::in_memory()] {
            let open = journals.open("tern", Side::Source).unwrap();
            assert!(matches!(journals.open("tern", Side::Source), Err(JournalsError::InUse(_))));
            assert!(journals.open("tern", Side::Destination).is_ok(), "the other side's is another");
            assert!(journals.open("gull", Side::Source).is_ok());
            drop(open);
            assert!(journals.open("tern", Side::Source).is_ok());
        }
    }

    #[test]
    fn its_space_is_reserved_and_it_is_this_users_alone() {
        let (folder, journals) = folder();
        let mut open = journals.open("tern", Side::Destination).unwrap();
        for number in 0..40 {
            open.append(Mark::Refused, Epoch([number; 16]), "").unwrap();
        }
        let found = fs::metadata(folder.path().join("state/tern.destination.journal")).unwrap();
        assert_eq!(found.len(), JOURNAL_LEN as u64);
        assert!(found.blocks() * 512 >= JOURNAL_LEN as u64, "{} blocks", found.blocks());
        assert_eq!(found.mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(folder.path().join("state")).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_is_no_journal_of_this_guest_and_side_is_refused_and_left_alone() {
        let (folder, journals) = folder();
        journals.open("tern", Side::Destination).unwrap().append(Mark::Refused, EPOCH, "").unwrap();
        let path = |name: &str| folder.path().join("state").join(name);
        fs::copy(path("tern.destination.journal"), path("tern.source.journal")).unwrap();
        fs::write(path("gull.source.journal"), b"not a journal").unwrap();
        fs::write(path("skua.source.journal"), vec![0; JOURNAL_LEN]).unwrap();
        std::os::unix::fs::symlink(path("tern.source.journal"), path("auk.source.journal")).unwrap();
        let foreign = |name: &str| match journals.open(name, Side::Source) {
            Err(JournalsError::Content { error, .. }) => error,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(foreign("tern"), JournalError::OtherSide(Side::Destination));
        assert_eq!(foreign("gull"), JournalError::Foreign);
        assert_eq!(foreign("skua"), JournalError::Foreign);
        assert!(matches!(journals.open("auk", Side::Source), Err(JournalsError::Io { .. })));
        assert_eq!(fs::read(path("gull.source.journal")).unwrap(), b"not a journal");
        assert!(journals.find(EPOCH, Side::Source).is_none());
        for name in ["", ".", "..", "a/b", ".hidden", "a\0b"] {
            assert!(matches!(journals.open(name, Side::Source), Err(JournalsError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_said_so_early() {
        let (folder, journals) = folder();
        journals.prepare().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = Journals::in_folder(file.join("state")).prepare().unwrap_err();
        assert!(matches!(error, JournalsError::Io { .. }), "{error}");
    }

    #[test]
    fn a_write_that_fails_is_not_counted_as_a_record() {
        let mut open = OpenJournal::failing(Side::Source, &[Mark::Committed]);
        assert!(open.append(Mark::Committed, EPOCH, "").is_err());
        assert_eq!(open.journal().last(), None);
    }
}

//! A state file: locking, reading and writing it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::error::StateError;
use super::folder::{FileStatus, StateFolder};
use super::holder::{HOLDER_LEN, LockHolder};
use super::memory::{self, Kept, Memory};
use super::sighting::Sighting;
#[cfg(test)]
use crate::handover::RecordKind;
use crate::handover::{JOURNAL_LEN, Journal, JournalError, Record, WRITE_LEN};

/// Where the records of a claim are kept.
#[derive(Debug)]
pub(super) enum Keeper {
    File {
        folder: StateFolder,
        file: File,
        holder: LockHolder,
        /// The process that had the guest last, if it died without a word.
        died: Option<LockHolder>,
    },
    Memory(Memory),
    /// A disk that fails to write these kinds of records.
    #[cfg(test)]
    Failing(Vec<RecordKind>),
}

impl Keeper {
    /// Writes the next record of `journal`, and returns once it is durable. Sets `unsure` as soon as the
    /// record may be on the disk.
    pub(super) fn write(
        &self,
        name: &str,
        journal: &Journal,
        record: &Record,
        unsure: &mut bool,
    ) -> Result<(), StateError> {
        match self {
            Self::File { folder, file, .. } => {
                let path = path(folder, name);
                let content = |error| StateError::Content { path: path.clone(), error };
                let (at, bytes) = journal.write(record).map_err(content)?;
                *unsure = true;
                write(file, &bytes, at).map_err(failed("write to", path))
            }
            Self::Memory(_) => Ok(()),
            #[cfg(test)]
            Self::Failing(marks) if marks.contains(&record.mark) => {
                *unsure = true;
                Err(failed("write to", "test".into())(io::ErrorKind::StorageFull.into()))
            }
            #[cfg(test)]
            Self::Failing(_) => Ok(()),
        }
    }

    pub(super) fn announce(&mut self, contact: &str) -> io::Result<()> {
        let Self::File { file, holder, died, .. } = self else { return Ok(()) };
        *died = None;
        holder.contact = Some(contact.to_owned());
        file.write_all_at(&holder.encode(), HOLDER_AT as u64)
    }

    /// How long a record takes: writes as much without a change. The fastest of several writes counts: the
    /// first also flushes the metadata of a new file, and other processes may be writing too.
    pub(super) fn record_time(&self, name: &str) -> Result<Duration, StateError> {
        let Self::File { folder, file, holder, .. } = self else { return Ok(Duration::ZERO) };
        let mut head = Journal::head();
        head[HOLDER_AT..][..HOLDER_LEN].copy_from_slice(&holder.encode());
        let mut quickest = Duration::MAX;
        for _ in 0..PROBES {
            let began = Instant::now();
            write(file, &head, 0).map_err(failed("write to", path(folder, name)))?;
            quickest = quickest.min(began.elapsed());
        }
        Ok(quickest)
    }

    /// Ends the claim.
    pub(super) fn release(&self, name: &str, journal: &Journal, says_nothing: bool) {
        match self {
            // Removed under the lock: a process that waits for the lock makes a new file. Closing the
            // descriptor releases the lock.
            Self::File { folder, file, .. } if says_nothing && folder.is_at(file, &file_name(name)) => {
                if let Err(error) = folder.remove_file(&file_name(name)) {
                    let path = path(folder, name);
                    tracing::warn!("the state file {} is empty and stays: {error}", path.display());
                }
            }
            Self::File { file, died, .. } => {
                // The entry about this process is no longer true. A process that only looked leaves that of
                // the one that died.
                let entry = died.as_ref().map_or([0; HOLDER_LEN], LockHolder::encode);
                let _ = file.write_all_at(&entry, HOLDER_AT as u64);
            }
            Self::Memory(memory) if says_nothing => drop(memory::lock(memory).remove(name)),
            Self::Memory(memory) => {
                let kept = Kept { journal: journal.clone(), claimed: false };
                memory::lock(memory).insert(name.to_owned(), kept);
            }
            #[cfg(test)]
            Self::Failing(_) => {}
        }
    }
}

/// Locks the state file of a guest, and makes it if it is missing. Returns its records.
pub(super) fn claim_file(folder: &StateFolder, name: &str) -> Result<(Journal, Keeper), StateError> {
    check_no_earlier(folder, name)?;
    let file = open_locked(folder, name)?;
    let journal = read(folder, &file, name)?;
    let died = noted(&file).filter(|holder| holder.process.is_some());
    let holder = LockHolder::of_this_process();
    // A hint for messages: the claim holds without it.
    let _ = file.write_all_at(&holder.encode(), HOLDER_AT as u64);
    Ok((journal, Keeper::File { folder: folder.clone(), file, holder, died }))
}

/// Reads a state file without a claim; `None` if it does not exist.
pub(super) fn look_at_file(folder: &StateFolder, name: &str) -> Result<Option<Sighting>, StateError> {
    check_no_earlier(folder, name)?;
    let Some(file) = folder.open_file(&file_name(name), false)? else { return Ok(None) };
    // A record may look damaged while it is being written.
    let mut journal = read(folder, &file, name);
    for _ in 0..READS {
        if journal.is_ok() {
            break;
        }
        thread::sleep(NAP);
        journal = read(folder, &file, name);
    }
    let journal = journal?;
    let is_locked = match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => false,
        Err(Errno::WOULDBLOCK) => true,
        Err(error) => return Err(failed("lock", path(folder, name))(error.into())),
    };
    let noted = noted(&file).unwrap_or_default();
    let (holder, died) = match is_locked {
        true => (Some(noted), None),
        // A process that ends in order removes its entry.
        false => (None, noted.process.is_some().then_some(noted)),
    };
    Ok(Some(Sighting { journal, holder, died }))
}

/// The entry about a process in a state file.
fn noted(file: &File) -> Option<LockHolder> {
    let mut text = [0; HOLDER_LEN];
    file.read_exact_at(&mut text, HOLDER_AT as u64).ok()?;
    Some(LockHolder::decode(&text))
}

/// What the file system says about a guest's state file; `None` if it does not exist.
pub(super) fn status(folder: &StateFolder, name: &str) -> Option<FileStatus> {
    folder.status(&file_name(name))
}

/// The guests that have a state file.
pub(super) fn names(folder: &StateFolder) -> Vec<String> {
    let names = folder.names().unwrap_or_default();
    names.iter().filter_map(|name| name.strip_suffix(SUFFIX)).map(str::to_owned).collect()
}

/// Opens the file and locks it; makes it if it is missing.
fn open_locked(folder: &StateFolder, name: &str) -> Result<File, StateError> {
    let claimed =
        |file: &File| StateError::Claimed { name: name.to_owned(), holder: noted(file).unwrap_or_default() };
    let deadline = Instant::now() + LOOKS_MAX;
    loop {
        let Some(file) = folder.open_file(&file_name(name), true)? else {
            folder.make_file(&file_name(name), JOURNAL_LEN as u64, &Journal::head())?;
            continue;
        };
        match lock(&file).map_err(failed("lock", path(folder, name)))? {
            Locked::Exclusively if folder.is_at(&file, &file_name(name)) => return Ok(file),
            // Another process removed or replaced the file meanwhile.
            Locked::Exclusively => {}
            Locked::ByAnother => return Err(claimed(&file)),
            Locked::ByLookers if Instant::now() >= deadline => return Err(claimed(&file)),
            Locked::ByLookers => thread::sleep(NAP),
        }
    }
}

enum Locked {
    Exclusively,
    ByAnother,
    /// By processes that only read it, for a moment.
    ByLookers,
}

fn lock(file: &File) -> io::Result<Locked> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(Locked::Exclusively),
        Err(Errno::WOULDBLOCK) => {}
        Err(error) => return Err(error.into()),
    }
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Locked::ByLookers),
        Err(Errno::WOULDBLOCK) => Ok(Locked::ByAnother),
        Err(error) => Err(error.into()),
    }
}

fn check_no_earlier(folder: &StateFolder, name: &str) -> Result<(), StateError> {
    for earlier in EARLIER {
        let earlier = format!("{name}{earlier}");
        if folder.open_file(&earlier, false)?.is_some() {
            return Err(StateError::Earlier(folder.path().join(earlier)));
        }
    }
    Ok(())
}

fn read(folder: &StateFolder, file: &File, name: &str) -> Result<Journal, StateError> {
    let path = path(folder, name);
    let content = |error| StateError::Content { path: path.clone(), error };
    let found = file.metadata().map_err(failed("read", path.clone()))?;
    if found.len() != JOURNAL_LEN as u64 {
        return Err(content(JournalError::Foreign));
    }
    let mut bytes = vec![0; JOURNAL_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(failed("read", path.clone()))?;
    Journal::read(&bytes).map_err(content)
}

/// Writes to the file, and returns once that is durable.
fn write(file: &File, bytes: &[u8; WRITE_LEN], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, at)?;
    file.sync_data()
}

fn file_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

fn path(folder: &StateFolder, name: &str) -> PathBuf {
    folder.path().join(file_name(name))
}

fn failed(what: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> StateError {
    move |error| StateError::Io { what, path, error }
}

const SUFFIX: &str = ".state";

/// The files of version 1.
const EARLIER: [&str; 2] = [".source.journal", ".destination.journal"];

/// In the head's first block, after the head itself.
const HOLDER_AT: usize = 2048;
/// How often to write as much as a record, to measure how long a record takes.
const PROBES: u32 = 3;

/// How often to read a file again that looks damaged.
const READS: usize = 5;
const NAP: Duration = Duration::from_millis(5);

/// How long to wait for processes that hold a shared lock on the file.
const LOOKS_MAX: Duration = Duration::from_secs(10);

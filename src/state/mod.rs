//! The persistent state of a host's guests: a state file for each, `NAME.state`, in a folder of this host
//! alone.
//!
//! The file holds the guest's [sequence of records](crate::handover::Journal), whichever role the host plays
//! in an attempt. A process that runs a guest, brings one to this host or moves one away holds a lock on the
//! file (`flock(2)`) until it ends, however it ends. So the lock and the last record alone answer these
//! questions:
//!
//! * Does a process of this host have the guest? Only if the file is locked.
//! * Is the name free? Only if no process has the file locked: two starts cannot both win.
//! * May the guest be started anew? See [`Standing`].
//!
//! All of the file's space is reserved and its head durable before anything depends on it. A file without a
//! record is removed when it is released, so that attempts which fail early leave nothing behind. A file with
//! a record stays, because another host may ask for that record: 136 KiB for each name.

mod claim;
mod error;
mod file;
mod folder;
mod holder;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

pub use self::claim::GuestClaim;
pub(crate) use self::claim::RecordWriter;
pub use self::error::{StartError, StateError};
use self::file::{Keeper, claim_file, look_at_file};
pub use self::folder::{FolderError, StorageCheck};
unstable! { use self::folder::StateFolder; }
pub use self::holder::LockHolder;
pub use crate::handover::{Journal, Record, RecordKind, Side, Standing};
use crate::poison::IgnorePoison;
use crate::wire::{AttemptId, NAME_MAX};

/// The state of all guests of a host.
#[derive(Clone, Debug)]
pub struct HostState(Place);

#[derive(Clone, Debug)]
enum Place {
    Folder(StateFolder),
    Memory(Memory),
}

/// The state of a process that keeps none on disk.
type Memory = Arc<Mutex<HashMap<String, Kept>>>;

#[derive(Clone, Debug)]
struct Kept {
    journal: Journal,
    claimed: bool,
}

/// A guest's state as seen without a claim.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// Its records.
    pub journal: Journal,
    /// The process that has the guest now, if any.
    pub holder: Option<LockHolder>,
}

impl HostState {
    /// Keeps the state in this folder, which is made if it is missing. The folder must be on a disk of this
    /// host alone and outlive a restart.
    ///
    /// # Errors
    /// [`FolderError`] if the folder is not safe for state, or cannot be written to.
    pub fn in_folder(path: &Path, check: StorageCheck) -> Result<Self, FolderError> {
        Ok(Self(Place::Folder(StateFolder::open(path, check)?)))
    }

    /// Keeps the state without files: the records last as long as this value and its clones, and so no longer
    /// than the process. A process or host that dies at the wrong moment then leaves a doubt that only the
    /// operator can settle, and a second process can start the same guest.
    #[must_use]
    pub fn lost_with_this_process() -> Self {
        Self(Place::Memory(Memory::default()))
    }

    /// Claims the name of a guest for as long as the claim and its clones live: no other process of this host
    /// can claim it meanwhile. An attempt that a dead process left ready to run is recorded as refused: it
    /// never ran, and now never will.
    ///
    /// # Errors
    /// [`StateError`]; nothing may be run or handed over then.
    pub fn claim(&self, name: &str) -> Result<GuestClaim, StateError> {
        check_name(name)?;
        let claim = match &self.0 {
            Place::Folder(folder) => {
                let (journal, keeper) = claim_file(folder, name)?;
                GuestClaim::new(name, journal, keeper)
            }
            Place::Memory(memory) => {
                let mut kept = lock(memory);
                let entry = kept.entry(name.to_owned());
                let kept = entry.or_insert_with(|| Kept { journal: Journal::empty(), claimed: false });
                if std::mem::replace(&mut kept.claimed, true) {
                    return Err(StateError::Claimed { name: name.to_owned(), holder: LockHolder::default() });
                }
                let keeper = Keeper::Memory(memory.clone());
                GuestClaim::new(name, kept.journal.clone(), keeper)
            }
        };
        claim.refuse_what_was_left_ready()?;
        Ok(claim)
    }

    /// Claims the name for a guest that is about to be started on this host, and records the start. If the
    /// last record says that a guest of this name may be elsewhere, only a guest that is `another` may be
    /// started.
    ///
    /// # Errors
    /// [`StartError`]; the guest must not be started.
    pub fn start(&self, name: &str, another: bool) -> Result<GuestClaim, StartError> {
        let claim = self.claim(name)?;
        let journal = claim.journal();
        match Standing::of(&journal) {
            standing if another || standing.may_start() => {}
            Standing::InDoubt(Record { peer, .. }) => {
                return Err(StartError::InDoubt { name: name.to_owned(), peer: peer.clone() });
            }
            Standing::Moved(Record { peer, .. }) | Standing::AtSource(Record { peer, .. }) => {
                return Err(StartError::Elsewhere { name: name.to_owned(), peer: peer.clone() });
            }
            Standing::Unknown | Standing::Ended(_) => {}
        }
        let (side, attempt_id) = (Side::Source, AttemptId([0; 16]));
        claim.append(Record {
            mark: RecordKind::Started,
            side,
            attempt_id,
            peer: String::new(),
            address: None,
        })?;
        Ok(claim)
    }

    /// Reads the state of a guest, even while a process has it claimed; `None` if it has none.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn look(&self, name: &str) -> Result<Option<Sighting>, StateError> {
        check_name(name)?;
        match &self.0 {
            Place::Folder(folder) => look_at_file(folder, name),
            Place::Memory(memory) => Ok(lock(memory).get(name).cloned().map(|Kept { journal, claimed }| {
                Sighting { journal, holder: claimed.then(LockHolder::default) }
            })),
        }
    }

    /// The guest that has a record of this attempt with the host in this role, and the last such record.
    /// Files that cannot be read are skipped with a warning.
    #[must_use]
    pub fn find(&self, attempt_id: AttemptId, side: Side) -> Option<(String, Record)> {
        self.names().into_iter().find_map(|name| {
            let sighting = self.look(&name).unwrap_or_else(|error| {
                tracing::warn!("{error}");
                None
            });
            let record = sighting?.journal.of(attempt_id).filter(|record| record.side == side).cloned()?;
            Some((name, record))
        })
    }

    fn names(&self) -> Vec<String> {
        match &self.0 {
            Place::Folder(folder) => file::names(folder),
            Place::Memory(memory) => lock(memory).keys().cloned().collect(),
        }
    }
}

fn lock(memory: &Mutex<HashMap<String, Kept>>) -> MutexGuard<'_, HashMap<String, Kept>> {
    memory.lock().ignore_poison()
}

fn check_name(name: &str) -> Result<(), StateError> {
    let plain = !name.is_empty() && name.len() <= NAME_MAX && !name.starts_with('.');
    if plain && !name.contains(['/', '\0']) {
        Ok(())
    } else {
        Err(StateError::Name(name.chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests;

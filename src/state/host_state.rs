//! The state of all guests of a host, in files or in memory.

use std::path::Path;

use super::claim::GuestClaim;
use super::error::{StartError, StateError};
use super::file::{Keeper, claim_file, look_at_file, names};
use super::folder::{FolderError, StateFolder, StorageCheck};
use super::holder::LockHolder;
use super::memory::{Kept, Memory, lock};
use super::sighting::Sighting;
use crate::handover::{Journal, Record, RecordKind, Side, Standing};
use crate::wire::{AttemptId, NAME_MAX};

/// The state of all guests of a host.
#[derive(Clone, Debug)]
pub struct HostState(Place);

#[derive(Clone, Debug)]
enum Place {
    Folder(StateFolder),
    Memory(Memory),
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
            identity: None,
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
                Sighting { journal, holder: claimed.then(LockHolder::default), died: None }
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

    /// The names of the guests that have a state on this host, in any order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        match &self.0 {
            Place::Folder(folder) => names(folder),
            Place::Memory(memory) => lock(memory).keys().cloned().collect(),
        }
    }
}

fn check_name(name: &str) -> Result<(), StateError> {
    let plain = !name.is_empty() && name.len() <= NAME_MAX && !name.starts_with('.');
    if plain && !name.chars().any(|character| character == '/' || character.is_control()) {
        Ok(())
    } else {
        Err(StateError::Name(name.chars().take(80).collect()))
    }
}

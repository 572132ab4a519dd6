//! The state of all guests of a host, in files or in memory.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use sterna_trust::Fingerprint;

use super::claim::GuestClaim;
use super::error::{StartError, StateError};
use super::file::{Keeper, claim_file, look_at_file, names};
use super::folder::{FolderError, StateFolder, StorageCheck};
use super::holder::LockHolder;
use super::index::Index;
use super::memory::{Kept, Memory, lock};
use super::room::make_room;
use super::sender::Sender;
use super::sighting::Sighting;
use crate::handover::{Journal, Record, RecordKind, Side, Standing};
use crate::wire::{AttemptId, NAME_MAX};

/// The state of all guests of a host.
#[derive(Clone, Debug)]
pub struct HostState(pub(super) Place);

#[derive(Clone, Debug)]
pub(super) enum Place {
    Folder(StateFolder, Arc<Index>),
    Memory(Memory),
}

impl HostState {
    /// Keeps the state in this folder, which is made if it is missing. The folder must be on a disk of this
    /// host alone and outlive a restart.
    ///
    /// # Errors
    /// [`FolderError`] if the folder is not safe for state, or cannot be written to.
    pub fn in_folder(path: &Path, check: StorageCheck) -> Result<Self, FolderError> {
        Ok(Self(Place::Folder(StateFolder::open(path, check)?, Arc::default())))
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
            Place::Folder(folder, _) => {
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

    /// The same for a guest that a host sends, which can leave only so many records of guests that never ran.
    ///
    /// # Errors
    /// [`StateError`]; the guest must be refused then.
    pub(crate) fn claim_from(
        &self,
        (address, identity): (IpAddr, Option<Fingerprint>),
        name: &str,
    ) -> Result<GuestClaim, StateError> {
        check_name(name)?;
        if let Place::Folder(folder, index) = &self.0 {
            let sender = Sender::of(Some(address), identity);
            make_room((folder, index), name, sender, SystemTime::now())?;
        }
        self.claim(name)
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
            Place::Folder(folder, _) => look_at_file(folder, name),
            Place::Memory(memory) => Ok(lock(memory).get(name).cloned().map(|Kept { journal, claimed }| {
                Sighting { journal, holder: claimed.then(LockHolder::default), died: None }
            })),
        }
    }

    /// The guest that has a record of this attempt with the host in this role, and the last such record.
    /// Files that cannot be read are skipped with a warning.
    #[must_use]
    pub fn find(&self, attempt_id: AttemptId, side: Side) -> Option<(String, Record)> {
        let names = self.names();
        if let Place::Folder(_, index) = &self.0 {
            index.keep_only(&names);
        }
        names.into_iter().filter(|name| self.may_have(name, attempt_id)).find_map(|name| {
            let sighting = self.look(&name).unwrap_or_else(|error| {
                tracing::warn!("{error}");
                None
            });
            let record = sighting?.journal.of(attempt_id).filter(|record| record.side == side).cloned()?;
            Some((name, record))
        })
    }

    /// Whether the guest's state may have a record of this attempt.
    fn may_have(&self, name: &str, attempt_id: AttemptId) -> bool {
        match &self.0 {
            Place::Folder(folder, index) => index.summary(folder, name).0.attempts.contains(&attempt_id),
            Place::Memory(_) => true,
        }
    }

    /// The names of the guests that have a state on this host, in any order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        match &self.0 {
            Place::Folder(folder, _) => names(folder),
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

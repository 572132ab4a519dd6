//! The claim of a guest's name, which lasts as long as the guest, and the records that it may write.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::error::StateError;
use super::file::Keeper;
use super::holder::LockHolder;
use crate::handover::{Journal, Record, RecordKind, Standing};
use crate::poison::IgnorePoison;

/// Exclusive claim of a guest's name and state on this host. Clones are the same claim; it lasts until the
/// last clone is dropped. Keep one for as long as the guest lives: the lock on the state file shows that it
/// does.
#[derive(Clone, Debug)]
pub struct GuestClaim(Arc<Claimed>);

#[derive(Debug)]
struct Claimed {
    name: String,
    records: Mutex<Records>,
}

#[derive(Debug)]
struct Records {
    journal: Journal,
    keeper: Keeper,
    /// A record could not be written, but may still be on the disk.
    unsure: bool,
    /// An attempt writes records; only one attempt does at a time.
    writing: bool,
}

impl GuestClaim {
    pub(super) fn new(name: &str, journal: Journal, keeper: Keeper) -> Self {
        let records = Mutex::new(Records { journal, keeper, unsure: false, writing: false });
        Self(Arc::new(Claimed { name: name.to_owned(), records }))
    }

    /// A claim on a disk that fails to write these kinds of records.
    #[cfg(test)]
    pub(crate) fn failing(marks: &[RecordKind]) -> Self {
        Self::new("tern", Journal::empty(), Keeper::Failing(marks.to_owned()))
    }

    /// The guest's name on this host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its records.
    #[must_use]
    pub fn journal(&self) -> Journal {
        self.records().journal.clone()
    }

    /// Writes into the state file how to reach the process that has the guest: a text of one line. It is a
    /// hint, and not durable.
    pub fn announce(&self, contact: &str) {
        if let Err(error) = self.records().keeper.announce(contact) {
            tracing::warn!(
                "the state file of {} does not say how to reach its process: {error}",
                self.name()
            );
        }
    }

    /// Records that the guest was not started after all, or ended on purpose. If an earlier guest of the name
    /// is elsewhere, its record is written again; unless an attempt left a record, the state file is removed.
    pub fn retire(&self) {
        let before = {
            let mut records = self.records();
            if records.unsure || records.journal.last().is_none_or(|last| last.mark != RecordKind::Started) {
                return;
            }
            let before =
                records.journal.records().iter().rev().find(|record| record.mark != RecordKind::Started);
            let before = before.cloned();
            if before.is_none() {
                records.journal = Journal::empty();
                records.keeper.release(self.name(), &records.journal, true);
            }
            before
        };
        if let Some(elsewhere) = before.filter(|record| !Standing::after(record).may_start())
            && let Err(error) = self.append(elsewhere)
        {
            tracing::warn!("{error}");
        }
    }

    /// The right to write records, which one attempt has at a time.
    ///
    /// # Errors
    /// [`StateError::Claimed`], or the error of a disk that takes no records.
    pub(crate) fn writer(&self) -> Result<RecordWriter, StateError> {
        let mut records = self.records();
        if records.writing {
            let holder = LockHolder::of_this_process();
            return Err(StateError::Claimed { name: self.0.name.clone(), holder });
        }
        let record_time = records.keeper.record_time(&self.0.name)?;
        records.writing = true;
        drop(records);
        Ok(RecordWriter { claim: self.clone(), record_time })
    }

    pub(super) fn append(&self, record: Record) -> Result<(), StateError> {
        let mut records = self.records();
        let Records { journal, keeper, unsure, .. } = &mut *records;
        keeper.write(&self.0.name, journal, &record, unsure)?;
        *unsure = false;
        journal.add(record);
        Ok(())
    }

    /// A guest that a dead process left ready to run never ran, because RUNNING would be recorded.
    pub(super) fn refuse_what_was_left_ready(&self) -> Result<(), StateError> {
        let last = self.records().journal.last().filter(|last| last.mark == RecordKind::Prepared).cloned();
        last.map_or(Ok(()), |last| self.append(Record { mark: RecordKind::Refused, ..last }))
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.0.records.lock().ignore_poison()
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let records = self.records.get_mut().ignore_poison();
        let says_nothing = records.journal.records().is_empty() && !records.unsure;
        records.keeper.release(&self.name, &records.journal, says_nothing);
    }
}

/// The right to write the records of an attempt.
#[derive(Debug)]
pub(crate) struct RecordWriter {
    claim: GuestClaim,
    record_time: Duration,
}

impl RecordWriter {
    /// Writes a record, and returns once it is durable.
    ///
    /// # Errors
    /// [`StateError`]; the record may still be on the disk.
    pub(crate) fn append(&self, record: Record) -> Result<(), StateError> {
        self.claim.append(record)
    }

    /// The last record.
    pub(crate) fn last(&self) -> Option<Record> {
        self.claim.records().journal.last().cloned()
    }

    /// How long a record takes, as measured when the attempt began.
    pub(crate) fn record_time(&self) -> Duration {
        self.record_time
    }
}

impl Drop for RecordWriter {
    fn drop(&mut self) {
        self.claim.records().writing = false;
    }
}

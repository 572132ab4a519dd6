//! What each state file holds, in short, and only as long as the file is unchanged. So a question about an
//! attempt reads the files that may have it, and not all.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::file::{look_at_file, status};
use super::folder::{FileStatus, StateFolder};
use super::sender::Sender;
use crate::poison::IgnorePoison;
use crate::wire::AttemptId;

/// The summaries of a folder's state files, by the guest's name.
#[derive(Debug, Default)]
pub(super) struct Index(Mutex<HashMap<String, (FileStatus, Summary)>>);

/// A state file in short.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    pub(super) attempts: Vec<AttemptId>,
    /// The host that sent the guest, if no guest of the name has ever run on this host: its attempts were
    /// refused, or their process died before GO.
    pub(super) left_by: Option<Sender>,
}

impl Index {
    /// What the guest's state file holds; nothing if it is missing or unusable. The second is when the file
    /// was changed last.
    pub(super) fn summary(&self, folder: &StateFolder, name: &str) -> (Summary, SystemTime) {
        // Before the file is read: a later change is seen the next time.
        let Some(found) = status(folder, name) else { return (Summary::default(), SystemTime::now()) };
        let known = self.0.lock().ignore_poison().get(name).cloned();
        if let Some((_, summary)) = known.filter(|(status, _)| *status == found) {
            return (summary, found.modified());
        }
        let looked = look_at_file(folder, name).inspect_err(|error| tracing::warn!("{error}"));
        let summary = looked.ok().flatten().map_or_else(Summary::default, |sighting| Summary {
            attempts: sighting.journal.records().iter().map(|record| record.attempt_id).collect(),
            left_by: Sender::that_left(&sighting.journal),
        });
        // Two changes within a tick of the file system's clock leave the same time.
        if found.changed().elapsed().is_ok_and(|age| age > TICK_MAX) {
            self.0.lock().ignore_poison().insert(name.to_owned(), (found.clone(), summary.clone()));
        }
        (summary, found.modified())
    }

    /// Forgets the files that are gone.
    pub(super) fn keep_only(&self, names: &[String]) {
        let mut known = self.0.lock().ignore_poison();
        if known.len() > names.len() {
            known.retain(|name, _| names.contains(name));
        }
    }

    /// How many files it knows.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().ignore_poison().len()
    }
}

/// More than the time in which a file system's clock stands still.
const TICK_MAX: Duration = Duration::from_secs(2);

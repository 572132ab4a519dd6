//! A guest's state as another process sees it.

use super::holder::LockHolder;
use crate::handover::Journal;

/// A guest's state as seen without a claim.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// Its records.
    pub journal: Journal,
    /// The process that has the guest now, if any.
    pub holder: Option<LockHolder>,
    /// The process that had the guest last, if it died without a word.
    pub died: Option<LockHolder>,
}

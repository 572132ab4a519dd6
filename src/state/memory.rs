//! The state of a process that keeps none on disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::handover::Journal;
use crate::poison::IgnorePoison;

/// By the guest's name.
pub(super) type Memory = Arc<Mutex<HashMap<String, Kept>>>;

#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) journal: Journal,
    pub(super) claimed: bool,
}

pub(super) fn lock(memory: &Mutex<HashMap<String, Kept>>) -> MutexGuard<'_, HashMap<String, Kept>> {
    memory.lock().ignore_poison()
}

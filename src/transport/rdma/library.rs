//! libibverbs, loaded once for the process.

use std::sync::Mutex;
use std::thread;

use sterna_rdma::{Error, Library};

use crate::poison::IgnorePoison;

/// The library, once it was loaded.
static LOADED: Mutex<Option<Library>> = Mutex::new(None);

/// Loads it and its drivers in a thread of its own.
pub(super) fn load_ahead() {
    let load = || library().map(|library| library.devices().map(drop));
    // If no thread can start, the first migration loads it.
    let _ = thread::Builder::new().name("load-verbs".into()).spawn(load);
}

/// The library. If it was missing, each call looks for it again.
pub(super) fn library() -> Result<Library, Error> {
    let mut loaded = LOADED.lock().ignore_poison();
    match &*loaded {
        Some(library) => Ok(library.clone()),
        None => Ok(loaded.insert(Library::load()?).clone()),
    }
}

//! libibverbs, loaded once for the process.

use std::sync::{Mutex, PoisonError};
use std::thread;

use sterna_rdma::{Error, Library};

/// The library, once it could be loaded.
static LOADED: Mutex<Option<Library>> = Mutex::new(None);

/// Loads libibverbs and its drivers in a thread of its own, and returns at once. The library opens a score of drivers when it is
/// first asked for devices, some tens of milliseconds that a migration otherwise spends at its start, at each end in turn: for a
/// VMM to call before there is a migration. Without a device, or without the library, nothing comes of it; who needs it
/// later is told why.
pub fn load_ahead() {
    let load = || library().map(|library| library.devices().map(drop));
    // Without a thread the first migration loads it.
    let _ = thread::Builder::new().name("load-verbs".into()).spawn(load);
}

/// The library. One that was missing is looked for again the next time.
pub(super) fn library() -> Result<Library, Error> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    match &*loaded {
        Some(library) => Ok(library.clone()),
        None => Ok(loaded.insert(Library::load()?).clone()),
    }
}

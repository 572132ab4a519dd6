//! A witness that checks again and again whether a guest runs on two hosts.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use sterna::handover::RecordKind;
use sterna::state::{HostState, StorageCheck};

use super::Host;

/// The places to check.
struct Places {
    name: String,
    source: PathBuf,
    destination: PathBuf,
    state: HostState,
}

/// Lets a witness watch a guest of this name and its two hosts for as long as `work` takes.
///
/// # Panics
/// If the guest ran twice.
pub(crate) fn never_runs_twice<T>(
    name: &str,
    (source, destination): (&Host, &Host),
    work: impl FnOnce() -> T,
) -> T {
    let places = Places {
        name: name.to_owned(),
        source: source.socket(name),
        destination: destination.socket(name),
        state: HostState::in_folder(&destination.state(), StorageCheck::Accept).expect("it is private"),
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let witness = scope.spawn(|| places.watch(&over));
        let done = {
            let _over = Over(&over);
            work()
        };
        match witness.join().expect("the witness does not panic") {
            Ok(samples) => assert!(samples > 0, "somebody looked"),
            Err(both) => panic!("it runs at the source, and did at the destination: {both}"),
        }
        done
    })
}

/// Ends the witness, also if the work panics: the scope waits for the witness.
struct Over<'watched>(&'watched AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Places {
    /// Returns the number of checks. The destination first: once it runs the guest, or has recorded that it
    /// will, the source must never run it again.
    fn watch(&self, over: &AtomicBool) -> Result<u64, String> {
        let mut samples = 0;
        while !over.load(Ordering::Relaxed) {
            let recorded = self.state.look(&self.name).ok().flatten();
            let recorded = recorded.and_then(|sighting| sighting.journal.last().map(|record| record.mark));
            let there = phase(&self.destination);
            let ran_there = recorded == Some(RecordKind::Running) || there.as_deref() == Some("running");
            if ran_there && phase(&self.source).as_deref() == Some("running") {
                return Err(format!("its phase is {there:?} there, its journal says {recorded:?}"));
            }
            samples += 1;
            thread::sleep(Duration::from_millis(2));
        }
        Ok(samples)
    }
}

/// The phase that the holder of a guest reports through this socket; `None` without a holder, or before the
/// guest has arrived.
pub(crate) fn phase(socket: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
    writeln!(stream, "{}", serde_json::json!({ "do": "status" })).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    let status: Value = serde_json::from_str(&line).ok()?;
    Some(status["phase"].as_str()?.to_owned())
}

//! Waiting for guests, which are slow where they are emulated.

use std::thread;
use std::time::{Duration, Instant};

/// The longest wait before a guest counts as hung. In a lab on a busy machine its kernel boots for minutes.
pub(super) const PATIENCE: Duration = Duration::from_secs(900);

/// Waits until `holds` returns true. When it never does, the test fails, with the state of each QEMU.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        let seconds = PATIENCE.as_secs();
        assert!(Instant::now() < deadline, "in {seconds} s it did not come to this: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

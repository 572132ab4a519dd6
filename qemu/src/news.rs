//! Follows the events of a source QEMU, for the tracker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::monitor::{MigrationStatus, Monitor};
use crate::qmp::{Event, Notice, QmpError};
use crate::tracker::Tracker;

/// A thread that follows the events until this value is dropped.
#[derive(Debug)]
pub(crate) struct News {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl News {
    /// Follows the events from now on. A guest that was paused before has no pause that concerns anybody.
    pub(crate) fn follow(monitor: Monitor, tracker: Arc<Tracker>, was_running: bool) -> io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        // Before the thread starts, so that no event is missed.
        let events = monitor.client().subscribe();
        let follower = Follower { monitor, tracker, was_running, paused: None };
        let until = Arc::clone(&over);
        let thread = thread::Builder::new().name("qemu-events".into()).spawn(move || {
            let mut follower = follower;
            while !until.load(Ordering::Relaxed) {
                match events.next(Instant::now() + LOOKS_EVERY) {
                    Some(Notice::Event(event)) => follower.hear(&event),
                    Some(Notice::Gap) => follower.look(),
                    None => {}
                }
            }
        })?;
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for News {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has reported that.
            let _ = thread.join();
        }
    }
}

struct Follower {
    monitor: Monitor,
    tracker: Arc<Tracker>,
    was_running: bool,
    /// When the guest stopped.
    paused: Option<Instant>,
}

impl Follower {
    fn hear(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" if self.was_running => self.paused = Some(Instant::now()),
            "RESUME" => self.paused = None,
            "MIGRATION_PASS" => {
                if let Some(pass) = event.data["pass"].as_u64() {
                    self.pass(pass);
                }
            }
            "MIGRATION" => {
                if let Some(status) = event.data["status"].as_str() {
                    self.status(&MigrationStatus::from(status));
                }
            }
            "SHUTDOWN" => self.tracker.fail("the guest has shut down, or QEMU was ended"),
            _ => {}
        }
    }

    /// QEMU began a pass.
    fn pass(&mut self, pass: u64) {
        // In its last stage, in which the guest is paused, QEMU does not answer.
        if self.paused.is_some() {
            return;
        }
        let named_before = self.tracker.pages().count_named();
        let remaining = self.monitor.migration().ok().and_then(|report| report.ram);
        let remaining_pages = remaining.map_or(0, |ram| ram.remaining / PAGE_BYTES);
        self.tracker.pass_found(pass, named_before, remaining_pages);
    }

    fn status(&mut self, status: &MigrationStatus) {
        match status {
            MigrationStatus::PreSwitchover => {
                let since = *self.paused.get_or_insert_with(Instant::now);
                self.tracker.paused(since);
            }
            MigrationStatus::Completed => self.tracker.completed(),
            MigrationStatus::Failed | MigrationStatus::Cancelling | MigrationStatus::Cancelled => {
                self.tracker.fail(format!("QEMU's migration is {status}"));
            }
            _ => {}
        }
    }

    /// Events may have been missed.
    fn look(&mut self) {
        let report = match self.monitor.migration() {
            Ok(report) => report,
            // Without a monitor no command can switch, or give the migration up.
            Err(QmpError::Connect { .. } | QmpError::OtherProcess { .. }) => {
                self.tracker.fail("QEMU has ended, or closed its monitor");
                return;
            }
            Err(_) => return,
        };
        self.status(&report.status);
        if let (None, Some(ram)) = (self.paused, report.ram) {
            self.tracker.pass_began(ram.dirty_sync_count, ram.remaining / PAGE_BYTES);
        }
    }
}

/// The size of a page of the stream.
const PAGE_BYTES: u64 = 4096;

/// How often the thread looks whether it is to end.
const LOOKS_EVERY: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::qmp::Client;

    #[test]
    fn a_monitor_that_closes_for_good_ends_the_migration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let tracker = Arc::new(Tracker::new(&[], Duration::from_millis(1)));
        let mut follower = Follower {
            monitor: Monitor::new(Client::new(&path)),
            tracker: Arc::clone(&tracker),
            was_running: true,
            paused: None,
        };
        drop(listener);
        follower.look();
        assert_eq!(tracker.failure().unwrap(), "QEMU has ended, or closed its monitor");
    }
}

//! A QEMU that is to take a guest: started with `-incoming defer -S`.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::QemuError;
use crate::monitor::{MigrationStatus, Monitor, Restore, RunState};
use crate::qmp::QmpError;

/// A QEMU that is to take a guest.
#[derive(Debug)]
pub struct DestinationQemu {
    monitor: Monitor,
    /// The operator's settings.
    restore: Mutex<Restore>,
}

/// Whether a guest that was started runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Started {
    /// It runs.
    Running,
    /// QEMU's answer was lost, or says neither.
    Unknown(String),
}

impl DestinationQemu {
    /// The QEMU behind this monitor, which must wait for a guest.
    ///
    /// # Errors
    /// [`QemuError::State`] if it does not wait.
    pub fn new(monitor: Monitor) -> Result<Self, QemuError> {
        match monitor.status()?.state {
            RunState::InMigrate => {}
            state => return Err(QemuError::State { state }),
        }
        let mut restore = Restore::default();
        restore.set_capabilities(&monitor, &CAPABILITIES)?;
        // It is as if `-S` had been given.
        monitor.stop()?;
        Ok(Self { monitor, restore: Mutex::new(restore) })
    }

    /// The monitor.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Loads a guest from what the source QEMU saved. All of its shared RAM is in place, and nothing writes
    /// to it any more. The guest is paused then.
    ///
    /// # Errors
    /// [`QemuError`]; QEMU before 9.1 usually ends.
    pub fn load(&self, state: &mut dyn Read) -> Result<(), QemuError> {
        let monitor = &self.monitor;
        let failed = |error| QemuError::Socket { what: "connect a pair of sockets", error };
        let (ours, of_qemu) = UnixStream::pair().map_err(failed)?;
        ours.set_write_timeout(Some(FEEDS_WITHIN)).map_err(failed)?;
        monitor.client().getfd(SOCKET_NAME, of_qemu.as_fd())?;
        drop(of_qemu);
        // Another client of the monitor may have said `cont`.
        monitor.stop()?;
        monitor.migrate_incoming_and_stay(&format!("fd:{SOCKET_NAME}"))?;
        let fed = io::copy(state, &mut &ours);
        // QEMU awaits the end of the stream.
        let _ = ours.shutdown(Shutdown::Write);
        let bytes = fed.as_ref().copied().unwrap_or(0);
        let limit = LOADS_WITHIN + Duration::from_secs(bytes >> 24);
        let loaded = self.await_loaded(Instant::now() + limit).map_err(not_loaded);
        // QEMU's reason explains more than the end of its socket.
        match (loaded, fed) {
            (Ok(()), Ok(_)) => Ok(()),
            (Err(error), _) => Err(error),
            (Ok(()), Err(error)) => Err(QemuError::Feed(error)),
        }
    }

    fn await_loaded(&self, deadline: Instant) -> Result<(), QemuError> {
        let report = self.monitor.client().wait_until(deadline, |_| {
            let report = self.monitor.migration()?;
            let ended = matches!(report.status, MigrationStatus::Completed | MigrationStatus::Failed);
            Ok::<_, QemuError>(ended.then_some(report))
        })?;
        let report = match report {
            Some(report) => report,
            None => self.monitor.migration()?,
        };
        if report.status != MigrationStatus::Completed {
            let why = report.error_desc.map(|why| format!(": {why}")).unwrap_or_default();
            return Err(QemuError::Migration { status: report.status, why, expected: "completed" });
        }
        match self.monitor.status()?.state {
            // The second is the state of a guest that was never started at the source.
            RunState::Paused | RunState::PreLaunch => Ok(()),
            state => Err(QemuError::NotPaused { state }),
        }
    }

    /// Starts the loaded guest.
    ///
    /// # Errors
    /// [`QemuError`] if QEMU refused: no vCPU has run, and none will without another command.
    pub fn start(&self) -> Result<Started, QemuError> {
        let said = self.monitor.cont();
        match said {
            Ok(()) => {}
            Err(error) if error.is_unknown() => tracing::warn!("{error}"),
            Err(error) => return Err(error.into()),
        }
        // A lost answer is no refusal: QEMU says what it did, now or in a moment.
        let deadline = Instant::now() + STARTS_WITHIN;
        let mut last = String::new();
        while Instant::now() < deadline {
            match self.monitor.status() {
                Ok(status) if status.running => {
                    self.put_back();
                    return Ok(Started::Running);
                }
                Ok(status) => last = format!("it is in state {} after `cont`", status.state),
                Err(error) => last = error.to_string(),
            }
            thread::sleep(LOOKS_EVERY);
        }
        Ok(Started::Unknown(last))
    }

    /// Puts the operator's settings back, once the guest has arrived.
    fn put_back(&self) {
        let mut restore = self.restore.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = restore.put_back(&self.monitor) {
            tracing::warn!("the settings of QEMU's migration are not those of before: {error}");
        }
    }

    /// Ends QEMU: no guest runs in it.
    ///
    /// # Errors
    /// [`QemuError::Qmp`].
    pub fn quit(&self) -> Result<(), QemuError> {
        Ok(self.monitor.quit()?)
    }
}

/// The failure of a load, with what usually mends it.
fn not_loaded(error: QemuError) -> QemuError {
    match error {
        QemuError::Migration { why, .. } => QemuError::NotLoaded { why },
        QemuError::Qmp(QmpError::Connect { .. } | QmpError::Lost { .. } | QmpError::Unsent { .. }) => {
            QemuError::NotLoaded { why: ": it has ended".into() }
        }
        other => other,
    }
}

/// The capabilities of a QEMU that takes what [`Blob`](crate::stream::Blob) writes. Late activation: without
/// it, QEMU 7.2 takes the locks of disks as it loads, and the source cannot take them back.
const CAPABILITIES: [(&str, bool); 3] =
    [("late-block-activate", true), ("return-path", false), ("multifd", false)];

/// QEMU's name for the socket.
const SOCKET_NAME: &str = "sterna-state";

/// How long QEMU may take no byte of the saved state.
const FEEDS_WITHIN: Duration = Duration::from_secs(20);

/// How long QEMU may take to load a guest, and a second more for each 16 MiB.
const LOADS_WITHIN: Duration = Duration::from_secs(20);

/// How long a guest may take to start.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
const LOOKS_EVERY: Duration = Duration::from_millis(2);

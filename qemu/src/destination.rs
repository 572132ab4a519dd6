//! A QEMU that is to take a guest: started with `-incoming defer -S`.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::compat::Readiness;
use crate::error::QemuError;
use crate::monitor::{MigrationStatus, Monitor, RunState};
use crate::note::Note;
use crate::qmp::QmpError;
use crate::settle::{Settled, start};

/// A QEMU that is to take a guest.
#[derive(Debug)]
pub struct DestinationQemu {
    monitor: Monitor,
    note: Note,
}

impl DestinationQemu {
    /// The QEMU behind this monitor, which must wait for the guest of this name and has these capabilities.
    /// The guest shall run on arrival, unless it was paused at its source.
    ///
    /// # Errors
    /// [`QemuError::State`] if it does not wait.
    pub fn new(monitor: Monitor, ready: &Readiness, guest: &str, shall_run: bool) -> Result<Self, QemuError> {
        match &ready.status.state {
            RunState::InMigrate => {}
            state => return Err(QemuError::State { state: state.clone() }),
        }
        // A process that died may have changed the settings before.
        let before = Note::find(&monitor)?.unwrap_or_default();
        let mut note = Note { guest: guest.to_owned(), shall_run, ..before };
        note.restore.set_capabilities(&monitor, &ready.capabilities, &CAPABILITIES)?;
        note.leave(&monitor)?;
        // It is as if `-S` had been given.
        monitor.stop()?;
        Ok(Self { monitor, note })
    }

    /// The monitor.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Whether QEMU can still take the guest, as far as the connection to its monitor shows that: it is not
    /// asked, and does not delay the answer.
    ///
    /// # Errors
    /// [`QemuError::Gone`] if it has ended, or closed the connection and takes no other.
    pub fn can_arrive(&self) -> Result<(), QemuError> {
        let client = self.monitor.client();
        if client.is_connected() {
            return Ok(());
        }
        client.peer().map(drop).map_err(QemuError::Gone)
    }

    /// Loads a guest from what the source QEMU saved. All of its shared RAM is in place, and nothing writes
    /// to it any more. The guest is paused then.
    ///
    /// # Errors
    /// [`QemuError`]; QEMU before 9.1 usually ends.
    pub fn load(&self, state: &mut dyn Read) -> Result<(), QemuError> {
        let monitor = &self.monitor;
        let began = Instant::now();
        let failed = |error| QemuError::Socket { what: "connect a pair of sockets", error };
        let (ours, of_qemu) = UnixStream::pair().map_err(failed)?;
        ours.set_write_timeout(Some(FEEDS_WITHIN)).map_err(failed)?;
        monitor.client().getfd(SOCKET_NAME, of_qemu.as_fd())?;
        drop(of_qemu);
        // Another client of the monitor may have said `cont`.
        monitor.stop()?;
        monitor.migrate_incoming_and_stay(&format!("fd:{SOCKET_NAME}"))?;
        let asked = began.elapsed();
        let fed = io::copy(state, &mut &ours);
        // QEMU awaits the end of the stream.
        let _ = ours.shutdown(Shutdown::Write);
        let bytes = fed.as_ref().copied().unwrap_or(0);
        let limit = LOADS_WITHIN + Duration::from_secs(bytes >> 24);
        let taken = began.elapsed();
        let loaded = self.await_loaded(Instant::now() + limit).map_err(not_loaded);
        let done = began.elapsed();
        tracing::debug!(
            "QEMU loads: asked after {asked:?}, {bytes} bytes taken after {taken:?}, done after {done:?}"
        );
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
            return Err(QemuError::migration(report, "completed"));
        }
        match self.monitor.status()?.state {
            // The second is the state of a guest that was never started at the source.
            RunState::Paused | RunState::PreLaunch => Ok(()),
            state => Err(QemuError::NotPaused { state }),
        }
    }

    /// Starts the loaded guest, unless it is to stay paused. The operator's settings are those of before once
    /// [`release`](Self::release) is called.
    ///
    /// # Errors
    /// [`QemuError`] if QEMU refused: no vCPU has run, and none will without another command.
    pub fn start(&self) -> Result<Settled, QemuError> {
        if self.note.shall_run { start(&self.monitor) } else { Ok(Settled::Paused) }
    }

    /// Puts the operator's settings back: the guest was started, or QEMU was given no state and waits for
    /// another guest.
    pub fn release(&self) {
        self.note.clone().fulfil(&self.monitor);
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
/// it, QEMU 7.2 takes the locks of disks as it loads, and the source cannot take them back. Events: the end
/// of the load is known at once.
const CAPABILITIES: [(&str, bool); 4] =
    [("late-block-activate", true), ("events", true), ("return-path", false), ("multifd", false)];

/// QEMU's name for the socket.
const SOCKET_NAME: &str = "sterna-state";

/// How long QEMU may take no byte of the saved state.
const FEEDS_WITHIN: Duration = Duration::from_secs(20);

/// How long QEMU may take to load a guest, and a second more for each 16 MiB.
const LOADS_WITHIN: Duration = Duration::from_secs(20);

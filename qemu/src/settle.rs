//! What becomes of a guest in its QEMU after a migration that did not succeed, or whose process died.
//!
//! | the owner | QEMU | what is done |
//! |---|---|---|
//! | this host | migrates, by Sterna | `migrate_cancel`, then as follows |
//! | this host | does not run the guest, and a [note](crate::note) says that it is to run | `cont` |
//! | this host | is `postmigrate`, and a note says that the guest was paused | nothing: `cont` would run it |
//! | this host | is `postmigrate`, without a note of Sterna | refused: the guest was moved for good |
//! | this host | any other state | nothing: the operator paused the guest |
//! | not known yet | runs the guest | `stop` |
//! | the other host | a note of Sterna is there | `quit` |

use std::thread;
use std::time::{Duration, Instant};

use crate::error::QemuError;
use crate::monitor::{MigrationStatus, Monitor, RunState, Status};
use crate::note::Note;
use crate::qmp::QmpError;

/// Which host owns the guest: the one that may run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The host of this QEMU.
    ThisHost,
    /// The guest was given away, and may run at the other host.
    Unknown,
    /// The guest runs at the other host, or was never given to this one.
    OtherHost,
}

/// Where a guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It runs in this QEMU.
    Running,
    /// It is paused in this QEMU.
    Paused,
    /// It is in this QEMU, which was to run it and does not say whether it does.
    Unknown(String),
    /// Its QEMU was made to end.
    Ended,
}

/// Whether a migration of Sterna began in this QEMU, and nothing has settled it.
///
/// # Errors
/// [`QemuError::Qmp`].
pub fn is_unsettled(monitor: &Monitor) -> Result<bool, QemuError> {
    Ok(Note::is_left(monitor)?)
}

/// Makes QEMU do with the guest of this name what its owner demands, in whatever state a migration of Sterna
/// left it.
///
/// # Errors
/// [`QemuError`]. The guest is as it was, unless [`QemuError::is_unknown`].
pub fn settle(monitor: &Monitor, guest: &str, owner: Owner) -> Result<Settled, QemuError> {
    let status = monitor.status()?;
    let note = Note::find(monitor)?;
    if let Some(other) = note.as_ref().filter(|note| note.guest != guest) {
        return Err(QemuError::OtherGuest { expected: guest.to_owned(), found: other.guest.clone() });
    }
    match owner {
        Owner::ThisHost if status.state == RunState::InMigrate => {
            Err(QemuError::State { state: RunState::InMigrate })
        }
        Owner::ThisHost => take_back(monitor, note),
        Owner::Unknown if status.running => {
            tracing::error!("the guest runs, although it was given to another host: it is stopped");
            monitor.stop()?;
            Ok(Settled::Paused)
        }
        Owner::OtherHost if status.state != RunState::InMigrate && note.is_some() => {
            monitor.quit()?;
            Ok(Settled::Ended)
        }
        Owner::Unknown | Owner::OtherHost => Ok(as_it_is(&status)),
    }
}

/// The guest is this host's, and runs at no other.
fn take_back(monitor: &Monitor, note: Option<Note>) -> Result<Settled, QemuError> {
    if note.is_some() {
        cancel(monitor)?;
    }
    let status = at_rest(monitor)?;
    let Some(note) = note else {
        return match status.state {
            RunState::PostMigrate => Err(QemuError::State { state: status.state }),
            _ => Ok(as_it_is(&status)),
        };
    };
    let settled = match note.shall_run && !status.running {
        true => run_on(monitor, &status)?,
        false => as_it_is(&status),
    };
    match settled {
        // Without a note, such a guest counts as given away for good. Nothing but `cont` takes QEMU out of
        // this state, and the guest was paused.
        Settled::Paused if status.state == RunState::PostMigrate => note.keep_without_settings(monitor),
        Settled::Unknown(_) => {}
        _ => note.fulfil(monitor),
    }
    Ok(settled)
}

/// The state of the guest once QEMU has ended its migration: a failure shows a moment before QEMU makes the
/// guest run again.
fn at_rest(monitor: &Monitor) -> Result<Status, QemuError> {
    let deadline = Instant::now() + ENDS_WITHIN;
    let rests = monitor.client().wait_until(deadline, |_| {
        let status = monitor.status()?;
        Ok::<_, QemuError>((status.state != RunState::FinishMigrate).then_some(status))
    })?;
    rests.ok_or(QemuError::State { state: RunState::FinishMigrate })
}

fn run_on(monitor: &Monitor, before: &Status) -> Result<Settled, QemuError> {
    let settled = start(monitor)?;
    if before.state == RunState::PostMigrate
        && let Err(error) = monitor.announce_self()
    {
        // The destination QEMU may have announced the guest as it loaded the guest.
        tracing::warn!("the network may look for the guest at the destination: {error}");
    }
    Ok(settled)
}

/// Starts the vCPUs. A lost answer is no refusal: QEMU says what it did, now or in a moment.
///
/// # Errors
/// [`QemuError`] if QEMU refused, or the command did not reach it: no vCPU has run, and none will without
/// another command.
pub(crate) fn start(monitor: &Monitor) -> Result<Settled, QemuError> {
    match monitor.cont() {
        Ok(()) => {}
        Err(error) if error.is_unknown() => tracing::warn!("{error}"),
        Err(error) => return Err(error.into()),
    }
    let deadline = Instant::now() + STARTS_WITHIN;
    let mut last = String::new();
    while Instant::now() < deadline {
        match monitor.status() {
            Ok(status) if status.running => return Ok(Settled::Running),
            Ok(status) => last = format!("QEMU is in state {} after `cont`", status.state),
            Err(error @ (QmpError::Connect { .. } | QmpError::OtherProcess { .. })) => {
                return Ok(Settled::Unknown(format!(
                    "QEMU has ended, after it was to run the guest: {error}"
                )));
            }
            Err(error) => last = error.to_string(),
        }
        thread::sleep(LOOKS_EVERY);
    }
    Ok(Settled::Unknown(last))
}

/// Gives up a migration that is under way.
pub(crate) fn cancel(monitor: &Monitor) -> Result<(), QemuError> {
    let status = monitor.migration()?.status;
    if !status.is_under_way() {
        return Ok(());
    }
    if status != MigrationStatus::Cancelling {
        monitor.migrate_cancel()?;
    }
    let deadline = Instant::now() + ENDS_WITHIN;
    let ended = monitor.client().wait_until(deadline, |_| {
        let report = monitor.migration()?;
        Ok::<_, QemuError>((!report.status.is_under_way()).then_some(()))
    })?;
    match ended {
        Some(()) => Ok(()),
        None => Err(QemuError::migration(monitor.migration()?, "cancelled")),
    }
}

fn as_it_is(status: &Status) -> Settled {
    if status.running { Settled::Running } else { Settled::Paused }
}

/// How long QEMU may take to end a migration.
pub(crate) const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// How long a guest may take to start.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
const LOOKS_EVERY: Duration = Duration::from_millis(2);

//! What keeps a guest from being moved by Sterna, with the remedy of each.

use std::fmt;

use super::refused_devices;
use crate::monitor::{Capabilities, MigrationReport, Monitor, Parameters, RunState, Status};
use crate::note::Note;
use crate::qmp::QmpError;
use crate::text::shown;

/// Capabilities that change the stream, or the handover, into one that Sterna does not follow.
const OFF: [&str; 15] = [
    "background-snapshot",
    "block",
    "compress",
    "dirty-bitmaps",
    "mapped-ram",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "release-ram",
    "return-path",
    "switchover-ack",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
];

/// Which of the two QEMUs is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The one with the guest.
    Source,
    /// The one that waits for it.
    Destination,
}

/// A reason not to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What cannot be moved, and why.
    pub what: String,
    /// What the operator can do.
    pub remedy: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}; {}", self.what, self.remedy)
    }
}

/// Whether a migration can begin.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// All reasons not to begin.
    pub refused: Vec<Refused>,
    /// What QEMU does with the guest.
    pub status: Status,
    /// The capabilities as they are.
    pub capabilities: Capabilities,
}

/// Asks QEMU whether a migration can begin.
///
/// # Errors
///
/// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
pub fn readiness(monitor: &Monitor, end: End) -> Result<Readiness, QmpError> {
    let (status, capabilities) = (monitor.status()?, monitor.capabilities()?);
    let was_paused = end == End::Source && status.state == RunState::PostMigrate && Note::is_left(monitor)?;
    let mut found =
        if was_paused { vec![paused_and_saved()] } else { Vec::from_iter(of_state(&status, end)) };
    found.extend(of_migration(&monitor.migration()?, end));
    found.extend(of_capabilities(&capabilities, end));
    found.extend(of_parameters(&monitor.parameters()?));
    let devices = refused_devices::find(monitor)?;
    found.extend(devices.into_iter().map(|(device, why)| Refused {
        what: format!("{device} cannot be moved: {why}"),
        remedy: "unplug it, or start the guest without it".into(),
    }));
    Ok(Readiness { refused: found, status, capabilities })
}

/// A guest that is this host's, and was paused, in the state from which QEMU moves no guest.
fn paused_and_saved() -> Refused {
    Refused {
        what: "the paused guest was saved by a migration that failed, and QEMU saves it again only once it has run"
            .into(),
        remedy: "let it run (QMP cont), and pause it again (QMP stop) if it is to stay paused".into(),
    }
}

fn of_state(status: &Status, end: End) -> Option<Refused> {
    let state = &status.state;
    let remedy = match (end, state) {
        (End::Source, RunState::Running | RunState::Paused | RunState::PreLaunch)
        | (End::Destination, RunState::InMigrate) => return None,
        (End::Destination, _) => "start the QEMU at the destination with `-incoming defer -S`",
        (End::Source, RunState::Suspended) => "wake the guest up first (QMP system_wakeup)",
        (End::Source, RunState::PostMigrate) => {
            "it was moved to another host before; only if it runs on no other host, QMP cont makes it run"
        }
        (End::Source, RunState::InMigrate) => "wait until a guest has arrived in it",
        (End::Source, RunState::FinishMigrate | RunState::SaveVm | RunState::RestoreVm) => {
            "wait until that ends"
        }
        (End::Source, _) => "make the guest run, or pause it",
    };
    let qemu = match end {
        End::Source => "the QEMU at the source",
        End::Destination => "the QEMU at the destination",
    };
    Some(Refused { what: format!("{qemu} is in the state {state}"), remedy: remedy.into() })
}

fn of_migration(report: &MigrationReport, end: End) -> Vec<Refused> {
    let mut found = Vec::new();
    if report.status.is_under_way() {
        found.push(Refused {
            what: format!("a migration is under way already (status {})", report.status),
            remedy: "wait for its end, or give it up (QMP migrate_cancel)".into(),
        });
    }
    if end == End::Source {
        found.extend(report.blocked_reasons.iter().map(|reason| Refused {
            what: format!("QEMU cannot move this guest: {}", shown(reason)),
            remedy: "take away what QEMU names".into(),
        }));
    }
    found
}

fn of_capabilities(capabilities: &Capabilities, end: End) -> Vec<Refused> {
    let on = OFF.iter().filter(|name| capabilities.is_on(name)).map(|name| Refused {
        what: format!("the migration capability {name} is on, with which Sterna cannot move the guest"),
        remedy: format!("switch it off (HMP migrate_set_capability {name} off)"),
    });
    let needed: &[&str] = match end {
        End::Source => &["events", "multifd", "pause-before-switchover"],
        End::Destination => &["events", "late-block-activate"],
    };
    let missing = needed.iter().filter(|name| capabilities.get(name).is_none()).map(|name| Refused {
        what: format!("this QEMU does not have the migration capability {name}"),
        remedy: "use QEMU 7.2 or later".into(),
    });
    on.chain(missing).collect()
}

fn of_parameters(parameters: &Parameters) -> Vec<Refused> {
    let set = |name: &str, harmless: &str, remedy: &str| {
        let value = parameters.text(name).filter(|value| *value != harmless)?;
        Some(Refused {
            what: format!("the migration parameter {name} is {}", shown(value)),
            remedy: remedy.into(),
        })
    };
    let compression = "set it to none (HMP migrate_set_parameter multifd-compression none)";
    let tls = "set it to an empty text: QEMU sends to Sterna on this host only";
    [set("multifd-compression", "none", compression), set("tls-creds", "", tls)]
        .into_iter()
        .flatten()
        .collect()
}

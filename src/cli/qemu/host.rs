//! The QEMU that takes a guest in.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sterna::destination::PendingArrival;
use sterna::guest::{GuestHost, Proposal, Refusal};
use sterna_qemu::compat::{Description, End, refusals};
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::{Client, QmpError};

use super::guest::{Fate, QemuGuest};
use crate::cli::incoming::Incoming;
use crate::cli::server::Server;
use crate::cli::signals;
use crate::cli::socket::{Listener, SocketError};
use crate::poison::IgnorePoison;

/// Takes a guest into a QEMU that was started with `-incoming defer -S`.
#[derive(Debug)]
pub(crate) struct QemuHost {
    /// Its monitor's socket.
    qmp: PathBuf,
    /// The guest's name on this host; `None` keeps its own.
    name: Option<String>,
    /// The operator's handle on an arriving guest.
    pending: PendingArrival,
    /// What becomes of this QEMU when the guest moves on.
    fate: Fate,
    /// The process of the latest QEMU at the socket, and its machine.
    machine: Mutex<Option<(i32, Description)>>,
}

impl GuestHost for QemuHost {
    type Guest = QemuGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<QemuGuest, Refusal> {
        let incompatible = |error: &dyn std::fmt::Display| Refusal::Incompatible(bounded(&error.to_string()));
        let source = Description::decode(proposal.details).map_err(|error| incompatible(&error))?;
        let name = self.name.clone().unwrap_or_else(|| proposal.name.to_owned());
        signals::guest_arrives();
        let socket = Listener::bind(&name).map_err(|error| match error {
            SocketError::Taken(name) => Refusal::NameTaken(name),
            error => incompatible(&error),
        })?;
        let monitor = Monitor::new(Client::new(&self.qmp));
        let refused = refusals(&monitor, End::Destination).map_err(|error| incompatible(&error))?;
        let here = self.machine(&monitor).map_err(|error| incompatible(&error))?;
        let mut reasons: Vec<_> = refused.iter().map(ToString::to_string).collect();
        reasons.extend(source.differences(&here));
        if !reasons.is_empty() {
            return Err(incompatible(&reasons.join("; ")));
        }
        let socket = Server::new(socket);
        socket.serve(Arc::new(Incoming { pending: self.pending.clone() }));
        let how = (source.was_paused, self.fate);
        QemuGuest::arriving((name, socket), (monitor, here), how).map_err(|error| incompatible(&error))
    }
}

impl QemuHost {
    /// Takes guests into the QEMU with a monitor at this socket.
    pub(crate) fn new(qmp: PathBuf, name: Option<String>, pending: PendingArrival, fate: Fate) -> Self {
        Self { qmp, name, pending, fate, machine: Mutex::default() }
    }

    /// Asks the QEMU for its machine before a guest comes, which takes a second.
    ///
    /// # Errors
    /// No QEMU answers.
    pub(crate) fn ask_ahead(&self) -> Result<(), QmpError> {
        self.machine(&Monitor::new(Client::new(&self.qmp))).map(drop)
    }

    /// The machine of the present QEMU.
    fn machine(&self, monitor: &Monitor) -> Result<Description, QmpError> {
        let process = monitor.client().peer()?.process;
        let mut known = self.machine.lock().ignore_poison();
        if let Some((_, machine)) = known.as_ref().filter(|(of, _)| *of == process) {
            return Ok(machine.clone());
        }
        let machine = Description::of(monitor)?;
        *known = Some((process, machine.clone()));
        Ok(machine)
    }
}

/// A reason with a length that a message can carry.
fn bounded(reason: &str) -> String {
    reason.chars().take(REASON_CHARS_MAX).collect()
}

/// How many characters of a reason reach the source.
const REASON_CHARS_MAX: usize = 1000;

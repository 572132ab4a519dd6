//! The QEMU that takes a guest in.

use std::path::PathBuf;
use std::sync::Arc;

use sterna::destination::PendingArrival;
use sterna::guest::{GuestHost, Proposal, Refusal};
use sterna_qemu::compat::{Description, End, refusals};
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::Client;

use super::guest::{Fate, QemuGuest};
use crate::cli::incoming::Incoming;
use crate::cli::server::Server;
use crate::cli::signals;
use crate::cli::socket::{Listener, SocketError};

/// Takes a guest into a QEMU that was started with `-incoming defer -S`.
#[derive(Debug)]
pub(crate) struct QemuHost {
    /// Its monitor's socket.
    pub(crate) qmp: PathBuf,
    /// The guest's name on this host; `None` keeps its own.
    pub(crate) name: Option<String>,
    /// The operator's handle on an arriving guest.
    pub(crate) pending: PendingArrival,
    /// What becomes of this QEMU when the guest moves on.
    pub(crate) fate: Fate,
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
        let here = Description::of(&monitor).map_err(|error| incompatible(&error))?;
        let mut reasons: Vec<_> = refused.iter().map(ToString::to_string).collect();
        reasons.extend(source.differences(&here));
        if !reasons.is_empty() {
            return Err(incompatible(&reasons.join("; ")));
        }
        let socket = Server::new(socket);
        socket.serve(Arc::new(Incoming { pending: self.pending.clone() }));
        let how = (source.was_paused, self.fate);
        QemuGuest::arriving(name, socket, monitor, how).map_err(|error| incompatible(&error))
    }
}

/// A reason with a length that a message can carry.
fn bounded(reason: &str) -> String {
    reason.chars().take(REASON_CHARS_MAX).collect()
}

/// How many characters of a reason reach the source.
const REASON_CHARS_MAX: usize = 1000;

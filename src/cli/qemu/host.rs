//! The QEMU that takes a guest in: one that waits already, or one that is started for the guest.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sterna::destination::PendingArrival;
use sterna::guest::{GuestHost, Proposal, Refusal};
use sterna_qemu::compat::{Description, End, readiness};
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::{Client, QmpError};
use sterna_qemu::shared_ram::shared_ram;

use super::guest::{ArrivalPlan, Fate, QemuGuest};
use super::machine::QemuMachine;
use super::start::{ComingGuest, StartCommand, StartedQemu};
use crate::cli::incoming::Incoming;
use crate::cli::machine;
use crate::cli::server::Server;
use crate::cli::signals;
use crate::cli::socket::{Listener, SocketError};
use crate::poison::IgnorePoison;

/// Takes a guest into a QEMU that was started with `-incoming defer -S`.
#[derive(Debug)]
pub(crate) struct QemuHost {
    qemu: WaitingQemu,
    /// The guest's name on this host; `None` keeps its own.
    name: Option<String>,
    /// The operator's handle on an arriving guest.
    pending: PendingArrival,
    /// What becomes of this QEMU when the guest moves on.
    fate: Fate,
    /// The process of the latest QEMU at the socket, and its machine. One that is started has its own.
    machine: Mutex<Option<(i32, QemuMachine)>>,
}

/// The QEMU that is to take a guest.
#[derive(Debug)]
pub(crate) enum WaitingQemu {
    /// It has a monitor at this socket.
    At(PathBuf),
    /// It is started when the guest comes, if the guest has no more RAM than this.
    Started(StartCommand, Option<u64>),
}

impl GuestHost for QemuHost {
    type Guest = QemuGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<QemuGuest, Refusal> {
        let source = Description::decode(proposal.details).map_err(|error| {
            if machine::is_description(proposal.details) {
                Refusal::Incompatible(OF_STERNA.into())
            } else {
                incompatible(&error)
            }
        })?;
        let name = self.name.clone().unwrap_or_else(|| proposal.name.to_owned());
        signals::guest_arrives();
        let socket = Listener::bind(&name).map_err(|error| match error {
            SocketError::Taken(name) => Refusal::NameTaken(name),
            error => incompatible(&error),
        })?;
        let (monitor, started) = self.qemu_for(proposal, &name, &source)?;
        let ready = readiness(&monitor, End::Destination).map_err(|error| incompatible(&error))?;
        let here = match &started {
            Some(_) => QemuMachine::of(&monitor),
            None => self.machine(&monitor),
        };
        let mut here = here.map_err(|error| incompatible(&error))?;
        let differences =
            source.differences(here.at_present(&monitor).map_err(|error| incompatible(&error))?);
        if !ready.refused.is_empty() || !differences.is_empty() {
            return Err(incompatible(&joined(
                ready.refused.iter().map(ToString::to_string).chain(differences),
            )));
        }
        let socket = Server::new(socket);
        socket.serve(Arc::new(Incoming { pending: self.pending.clone() }));
        let how = ArrivalPlan { was_paused: source.was_paused, started_for_it: started.is_some() };
        let guest = QemuGuest::arriving((name, socket), (monitor, here, &ready), (how, self.fate))
            .map_err(|error| incompatible(&error))?;
        // From now on the guest ends it, if it does not arrive.
        if let Some(started) = started {
            started.keep();
        }
        Ok(guest)
    }
}

impl QemuHost {
    pub(crate) fn new(qemu: WaitingQemu, name: Option<String>, pending: PendingArrival, fate: Fate) -> Self {
        Self { qemu, name, pending, fate, machine: Mutex::default() }
    }

    /// Asks a QEMU that waits already, before a guest comes: for its machine, which takes a second, and for
    /// all that keeps guests away.
    ///
    /// # Errors
    /// No QEMU answers, or it can take no guest.
    pub(crate) fn ask_ahead(&self) -> Result<(), String> {
        let WaitingQemu::At(qmp) = &self.qemu else { return Ok(()) };
        let monitor = Monitor::new(Client::new(qmp));
        let refused = readiness(&monitor, End::Destination).map_err(|error| error.to_string())?.refused;
        if !refused.is_empty() {
            return Err(joined(refused.iter().map(ToString::to_string)));
        }
        shared_ram(&monitor).map_err(|error| error.to_string())?;
        self.machine(&monitor).map(drop).map_err(|error| error.to_string())
    }

    /// The QEMU for this guest, and whether it was started for the guest.
    fn qemu_for(
        &self,
        proposal: &Proposal<'_>,
        name: &str,
        source: &Description,
    ) -> Result<(Monitor, Option<StartedQemu>), Refusal> {
        let (start, memory_max_bytes) = match &self.qemu {
            WaitingQemu::At(qmp) => return Ok((Monitor::new(Client::new(qmp)), None)),
            WaitingQemu::Started(start, memory_max_bytes) => (start, memory_max_bytes),
        };
        let memory_bytes = proposal.ram.total_bytes();
        if let Some(available_bytes) = memory_max_bytes.filter(|&most| most < memory_bytes) {
            return Err(Refusal::Memory { needed_bytes: memory_bytes, available_bytes });
        }
        let guest = ComingGuest {
            name,
            memory_bytes,
            machine_type: &source.machine_type,
            vcpus: source.vcpus,
            accelerator: source.accelerator,
            from: proposal.from,
        };
        let started = start.start(&guest).map_err(|error| incompatible(&error))?;
        Ok((started.monitor().clone(), Some(started)))
    }

    /// The machine of the present QEMU.
    fn machine(&self, monitor: &Monitor) -> Result<QemuMachine, QmpError> {
        let process = monitor.client().peer()?.process;
        let mut known = self.machine.lock().ignore_poison();
        if let Some((_, machine)) = known.as_ref().filter(|(of, _)| *of == process) {
            return Ok(machine.clone());
        }
        let machine = QemuMachine::of(monitor)?;
        *known = Some((process, machine.clone()));
        Ok(machine)
    }
}

/// A refusal with a reason of a length that a message can carry.
fn incompatible(reason: &dyn Display) -> Refusal {
    Refusal::Incompatible(reason.to_string().chars().take(REASON_CHARS_MAX).collect())
}

fn joined(reasons: impl Iterator<Item = String>) -> String {
    reasons.collect::<Vec<_>>().join("; ")
}

/// The guest has another VMM.
const OF_STERNA: &str = "it is a guest of Sterna's own VMM, and this host waits for one of QEMU; start \
    `sterna receive` at the destination without `--qmp` and `--start`";

/// How many characters of a reason reach the source.
const REASON_CHARS_MAX: usize = 1000;

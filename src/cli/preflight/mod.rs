//! Checks of this machine: what it has for running and moving guests, what it lacks, and the command that
//! fixes each lack.
//!
//! Reading and judging are separate: [`Readings::take`] reads `/proc`, `/sys`, `/dev` and the verbs library
//! and never fails. [`judge`] turns the readings into [`Check`]s, and [`Transports`] uses only them, so that
//! both can be tested on machines that do not exist.

mod kvm;
mod memory;
mod network;
mod platform;
mod rdma;
mod sysfs_rdma;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub(crate) use kvm::{KvmCapabilities, KvmReadings};
pub(crate) use memory::MemoryReadings;
pub(crate) use network::{Firewall, Netdev, NetworkReadings};
#[cfg(test)]
pub(crate) use platform::Packages;
pub(crate) use platform::{Platform, program};
#[cfg(test)]
pub(crate) use rdma::VerbsLibrary;
pub(crate) use rdma::{RdmaReadings, Transports};
pub(crate) use sysfs_rdma::{ModuleState, RdmaDevice, RdmaPort, rdma_devices};

use sterna::host::Tree;

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// The check, as `group.name`. Does not change between releases; checks of several devices may share an
    /// id.
    pub(crate) id: &'static str,
    /// The outcome.
    pub(crate) outcome: Outcome,
    /// The finding, in a sentence.
    pub(crate) found: String,
    /// The command that fixes a lack, or a sentence if no command can. None if nothing lacks.
    pub(crate) remedy: Option<String>,
}

impl Check {
    /// The part of the id before the dot.
    #[must_use]
    pub(crate) fn group(&self) -> &'static str {
        self.id.split_once('.').map_or(self.id, |(group, _)| group)
    }

    fn new(id: &'static str, outcome: Outcome, found: impl Into<String>) -> Self {
        Self { id, outcome, found: found.into(), remedy: None }
    }

    fn mend(self, remedy: impl Into<Option<String>>) -> Self {
        Self { remedy: remedy.into(), ..self }
    }
}

/// The outcome of a check, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Outcome {
    /// As it should be.
    Pass,
    /// A note; all that was set up works.
    Info,
    /// Something will be slow, or something that is set up cannot be used.
    Warn,
    /// This machine cannot run or move guests.
    Fail,
}

/// All readings of a machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readings {
    /// Distribution, kernel, privileges of this process.
    pub(crate) platform: Platform,
    /// `/dev/kvm`.
    pub(crate) kvm: KvmReadings,
    /// Memory and its limits.
    pub(crate) memory: MemoryReadings,
    /// Network interfaces.
    pub(crate) network: NetworkReadings,
    /// RDMA devices, as the kernel and the verbs library list them.
    pub(crate) rdma: RdmaReadings,
}

impl Readings {
    /// Reads this machine. What cannot be read counts as absent.
    #[must_use]
    pub(crate) fn take() -> Self {
        let tree = Tree::machine();
        Self {
            platform: Platform::read(&tree),
            kvm: KvmReadings::read(&tree),
            memory: MemoryReadings::read(&tree),
            network: NetworkReadings::read(&tree),
            rdma: RdmaReadings::read(&tree),
        }
    }
}

/// Judges the readings.
#[must_use]
pub(crate) fn judge(readings: &Readings) -> Vec<Check> {
    let mut checks = kvm::judge(&readings.kvm, &readings.platform);
    checks.extend(memory::judge(readings));
    checks.extend(rdma::judge(readings));
    checks.extend(network::judge(readings));
    checks
}

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
mod tree;

use serde::Serialize;

pub use kvm::{KvmAccess, KvmCapabilities, KvmReadings, kvm_access};
pub use memory::{Memlock, MemoryReadings, available_memory_bytes, memlock, resident_memory_bytes};
pub use network::{Firewall, Netdev, NetworkReadings};
pub use platform::{Packages, Platform, Privileges, program};
pub use rdma::{RdmaReadings, Transports, VerbsDevice, VerbsLibrary};
pub use sysfs_rdma::{Gid, ModuleState, RdmaDevice, RdmaPort, rdma_devices};

use tree::Tree;

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The check, as `group.name`. Does not change between releases; checks of several devices may share an
    /// id.
    pub id: &'static str,
    /// The outcome.
    pub outcome: Outcome,
    /// The finding, in a sentence.
    pub found: String,
    /// The command that fixes a lack, or a sentence if no command can. None if nothing lacks.
    pub remedy: Option<String>,
}

impl Check {
    /// The part of the id before the dot.
    #[must_use]
    pub fn group(&self) -> &'static str {
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
pub enum Outcome {
    /// As it should be.
    Pass,
    /// Worth knowing; nothing that was set up is broken.
    Info,
    /// Something will be slow, or something that is set up cannot be used.
    Warn,
    /// This machine cannot run or move guests.
    Fail,
}

/// All readings of a machine.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// Distribution, kernel, privileges of this process.
    pub platform: Platform,
    /// `/dev/kvm`.
    pub kvm: KvmReadings,
    /// Memory and its limits.
    pub memory: MemoryReadings,
    /// Network interfaces.
    pub network: NetworkReadings,
    /// RDMA devices, as the kernel and the verbs library list them.
    pub rdma: RdmaReadings,
}

impl Readings {
    /// Reads this machine. What cannot be read counts as absent.
    #[must_use]
    pub fn take() -> Self {
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
pub fn judge(readings: &Readings) -> Vec<Check> {
    let mut checks = kvm::judge(&readings.kvm, &readings.platform);
    checks.extend(memory::judge(readings));
    checks.extend(rdma::judge(readings));
    checks.extend(network::judge(readings));
    checks
}

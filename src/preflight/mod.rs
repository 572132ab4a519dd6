//! What this machine has for running and moving guests, what it lacks, and the command that mends each lack.
//!
//! Reading and judging are apart: [`Readings::take`] looks at `/proc`, `/sys`, `/dev` and the verbs library and never
//! fails; [`judge`] turns what was read into [`Check`]s and [`Transports`] looks at nothing else, so that both can be
//! tried on machines that do not exist.

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

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Which check, as `group.name`. Does not change between releases; one for each device may carry the same.
    pub id: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found, in a sentence.
    pub found: String,
    /// The command that mends a lack, or a sentence where no command can. None where nothing lacks.
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

/// How a check ended, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Outcome {
    /// As it should be.
    Pass,
    /// Worth knowing; nothing that was set up is broken.
    Info,
    /// Something will be slow, or something that is set up cannot be used.
    Warn,
    /// Guests cannot be run or moved here.
    Fail,
}

/// All that was read of a machine.
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
    /// RDMA devices, as the kernel and as the verbs library see them.
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

/// Judges what was read.
#[must_use]
pub fn judge(readings: &Readings) -> Vec<Check> {
    let mut checks = kvm::judge(&readings.kvm, &readings.platform);
    checks.extend(memory::judge(readings));
    checks.extend(rdma::judge(readings));
    checks.extend(network::judge(readings));
    checks
}

//! What this machine has, as far as it can be read.

mod kvm;
mod memory;
mod network;
mod platform;
mod rdma;
mod sysfs_rdma;

use sterna::host::Tree;

pub(crate) use kvm::{KvmCapabilities, KvmReadings};
pub(crate) use memory::MemoryReadings;
pub(crate) use network::{Firewall, Netdev, NetworkReadings};
#[cfg(test)]
pub(crate) use platform::Packages;
pub(crate) use platform::{Platform, program};
#[cfg(test)]
pub(crate) use rdma::VerbsDevice;
pub(crate) use rdma::{RdmaReadings, VerbsLibrary};
#[cfg(test)]
pub(crate) use sysfs_rdma::{Gid, read_devices};
pub(crate) use sysfs_rdma::{ModuleState, RdmaDevice, RdmaPort, rdma_devices};

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

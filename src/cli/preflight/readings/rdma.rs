//! RDMA devices, as the kernel and the verbs library list them.

use sterna::host::Tree;
use sterna_rdma::{Device, Error, Library};

use super::platform::program;
use super::sysfs_rdma::{ModuleState, RdmaDevice, RdmaPort, read_devices};

/// The readings of RDMA.
#[derive(Clone, Debug, Default)]
pub(crate) struct RdmaReadings {
    /// The devices as the kernel lists them.
    pub(crate) devices: Vec<RdmaDevice>,
    /// The verbs library, and the devices as it lists them.
    pub(crate) library: VerbsLibrary,
    /// The kernel module of soft-RoCE.
    pub(crate) soft_roce_module: ModuleState,
    /// Whether iproute2's program `rdma`, which makes soft-RoCE devices, is installed.
    pub(crate) rdma_program: bool,
}

/// The verbs library, libibverbs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VerbsLibrary {
    /// It does not load: the message of the loader or the library.
    Missing(String),
    /// It loads and lists these devices.
    Loaded(Vec<VerbsDevice>),
}

impl Default for VerbsLibrary {
    fn default() -> Self {
        Self::Missing("not looked for".to_owned())
    }
}

/// A device as the verbs library lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VerbsDevice {
    /// Its name.
    pub(crate) name: String,
    /// The active MTU in bytes of each port by number, or why the device does not open.
    pub(crate) active_mtus: Result<Vec<(u8, u32)>, String>,
}

impl RdmaReadings {
    pub(crate) fn read(tree: &Tree) -> Self {
        let devices = read_devices(tree);
        Self {
            library: read_library(),
            soft_roce_module: ModuleState::of_soft_roce(tree, &devices),
            devices,
            rdma_program: program("rdma").is_some(),
        }
    }

    pub(crate) fn verbs(&self, device: &RdmaDevice) -> Option<&VerbsDevice> {
        match &self.library {
            VerbsLibrary::Missing(_) => None,
            VerbsLibrary::Loaded(devices) => devices.iter().find(|verbs| verbs.name == device.name),
        }
    }

    pub(crate) fn ready(&self, device: &RdmaDevice) -> bool {
        !device.iwarp
            && self.verbs(device).is_some_and(|verbs| verbs.active_mtus.is_ok())
            && device.ports.iter().any(port_ready)
    }
}

fn read_library() -> VerbsLibrary {
    let library = match Library::load() {
        Ok(library) => library,
        Err(Error::LibraryNotFound { reason }) => return VerbsLibrary::Missing(reason),
        Err(error) => return VerbsLibrary::Missing(error.to_string()),
    };
    // The library reports an error if it finds no device; the kernel's own list says whether that is a fault.
    let infos = library.devices().unwrap_or_default();
    let devices = infos.into_iter().map(|info| {
        let ports = Device::open(&library, &info.name).and_then(|device| device.ports());
        let active_mtus = ports.map(|ports| {
            ports.iter().map(|port| (port.number, u32::from(port.active_mtu.bytes()))).collect::<Vec<_>>()
        });
        VerbsDevice { name: info.name, active_mtus: active_mtus.map_err(|error| error.to_string()) }
    });
    VerbsLibrary::Loaded(devices.collect())
}

fn port_ready(port: &RdmaPort) -> bool {
    port.active() && (port.infiniband || port.roce_gid().is_some())
}

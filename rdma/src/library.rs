//! Finding libibverbs and the devices it can drive.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::sys::Functions;
use crate::sys::constants::{IBV_TRANSPORT_IB, IBV_TRANSPORT_IWARP};
use crate::sys::context::DeviceList;

/// The kernel's folder of RDMA devices.
const SYSFS: &str = "/sys/class/infiniband";

/// libibverbs, loaded. A clone is another handle to the same library.
#[derive(Clone, Debug)]
pub struct Library {
    functions: Arc<Functions>,
}

impl Library {
    /// Loads `libibverbs.so.1`.
    ///
    /// # Errors
    /// [`Error::LibraryNotFound`] when the machine has none, [`Error::LibraryTooOld`] when a function is
    /// missing.
    pub fn load() -> Result<Library, Error> {
        Ok(Library { functions: Functions::load()? })
    }

    /// The devices that can be opened, in the library's order; never an empty list.
    ///
    /// # Errors
    /// [`Error::NoDevice`] when the machine has none, [`Error::NoUserSpaceDriver`] when the kernel has some
    /// that the library cannot drive, [`Error::Call`] when the kernel does not answer.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, Error> {
        let list = self.list()?;
        Ok((0..list.len()).map(|index| describe(&list, index)).collect())
    }

    /// The list from which [`Device::open`](crate::Device::open) opens; never empty.
    pub(crate) fn list(&self) -> Result<DeviceList, Error> {
        match DeviceList::get(&self.functions)? {
            Some(list) if list.len() > 0 => Ok(list),
            _ => Err(match kernel_devices() {
                devices if devices.is_empty() => Error::NoDevice,
                devices => Error::NoUserSpaceDriver { devices: devices.join(", ") },
            }),
        }
    }
}

/// A device's properties, readable without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The kernel's name, such as `mlx5_0` or `rxe0`.
    pub name: String,
    /// The node GUID, in host order.
    pub node_guid: u64,
    /// The wire protocol.
    pub transport: Transport,
    /// Whether it is soft-RoCE (`rdma_rxe`): the kernel's CPU does the work of an adapter.
    pub soft_roce: bool,
    /// The network interface under its first port, if any.
    pub netdev: Option<String>,
}

/// The wire protocol of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transport {
    /// InfiniBand's transport, on an InfiniBand link or on Ethernet (RoCE).
    InfiniBand,
    /// iWARP, RDMA over TCP; needs a connection manager, so Sterna cannot use it.
    Iwarp,
    /// Another `ibv_transport_type`.
    Other(i32),
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transport::InfiniBand => formatter.write_str("InfiniBand"),
            Transport::Iwarp => formatter.write_str("iWARP"),
            Transport::Other(number) => write!(formatter, "transport {number}"),
        }
    }
}

pub(crate) fn describe(list: &DeviceList, index: usize) -> DeviceInfo {
    let name = list.name(index);
    let folder = Path::new(SYSFS).join(&name);
    let transport = match list.transport(index) {
        IBV_TRANSPORT_IB => Transport::InfiniBand,
        IBV_TRANSPORT_IWARP => Transport::Iwarp,
        other => Transport::Other(other),
    };
    let parent = soft_roce_parent(&folder);
    DeviceInfo {
        node_guid: list.guid(index),
        transport,
        soft_roce: parent.is_some(),
        netdev: parent.or_else(|| first_port_netdev(&folder)).or_else(|| adapter_netdev(&folder)),
        name,
    }
}

/// The interface beneath a soft-RoCE device. Only `rdma_rxe` has the attribute `parent`.
fn soft_roce_parent(folder: &Path) -> Option<String> {
    read_line(folder.join("parent"))
}

/// The interface that owns the first GID of port 1.
fn first_port_netdev(folder: &Path) -> Option<String> {
    read_line(folder.join("ports/1/gid_attrs/ndevs/0"))
}

/// The interface of the same adapter, if any.
fn adapter_netdev(folder: &Path) -> Option<String> {
    let mut names = entries(&folder.join("device/net"));
    names.sort();
    names.into_iter().next()
}

/// The names of the kernel's RDMA devices.
fn kernel_devices() -> Vec<String> {
    let mut names = entries(Path::new(SYSFS));
    names.sort();
    names
}

fn entries(folder: &Path) -> Vec<String> {
    let Ok(folder) = fs::read_dir(folder) else { return Vec::new() };
    folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn read_line(path: PathBuf) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

//! The RDMA device under test, and its counters.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use sterna_rdma::{Device, GidChoice, Library, Port};

use super::failure::Failure;

/// An RDMA device of this machine with a usable address; it is the device of both ends.
#[derive(Clone, Debug)]
pub(crate) struct RdmaDevice {
    pub(crate) name: String,
    pub(crate) port: u8,
    pub(crate) gid_index: u32,
    pub(crate) address: IpAddr,
    pub(crate) mtu_bytes: u16,
}

impl RdmaDevice {
    /// The named device, or the first with an active port.
    pub(crate) fn find(wanted: Option<&str>) -> Result<Self, Failure> {
        let none = |error: &dyn std::fmt::Display| Failure::NoDevice(error.to_string());
        let library = Library::load().map_err(|error| none(&error))?;
        let devices = library.devices().map_err(|error| none(&error))?;
        for info in devices.iter().filter(|info| wanted.is_none_or(|wanted| wanted == info.name)) {
            let device = Device::open(&library, &info.name).map_err(|error| none(&error))?;
            let ports = device.ports().map_err(|error| none(&error))?;
            if let Some(port) = ports.into_iter().find(Port::is_active) {
                let gid = port.choose_gid(GidChoice::Auto).map_err(|error| none(&error))?;
                return Ok(Self {
                    name: info.name.clone(),
                    port: port.number,
                    gid_index: gid.index,
                    address: gid.ip(),
                    mtu_bytes: port.active_mtu.bytes(),
                });
            }
        }
        Err(Failure::NoDevice(match wanted {
            Some(wanted) => format!("{wanted} is not there, or has no active port"),
            None => "none has an active port".into(),
        }))
    }

    /// An upper bound of the bytes that have left this machine's interfaces and this device so far.
    ///
    /// Hardware counts the words it sends. Soft-RoCE counts packets, and its packets to the device itself
    /// pass no interface: each counts with the maximal length of a packet.
    pub(crate) fn sent_bytes_max(&self) -> Result<u64, Failure> {
        let port = PathBuf::from(format!("/sys/class/infiniband/{}/ports/{}", self.name, self.port));
        let words = number(port.join("counters/port_xmit_data"));
        let packets = || number(port.join("hw_counters/sent_pkts"));
        let by_device = match words {
            Ok(words) => words * 4,
            Err(_) => packets()? * (u64::from(self.mtu_bytes) + HEADERS_BYTES_MAX),
        };
        let interfaces =
            fs::read_dir("/sys/class/net").map_err(Failure::system("look into /sys/class/net"))?;
        let mut by_interfaces = 0;
        for interface in interfaces.flatten() {
            // An interface may vanish meanwhile.
            by_interfaces += number(interface.path().join("statistics/tx_bytes")).unwrap_or(0);
        }
        Ok(by_device + by_interfaces)
    }
}

/// Ethernet, IPv6, UDP, the InfiniBand headers of a first or only write with an immediate, and two checksums.
const HEADERS_BYTES_MAX: u64 = 18 + 40 + 8 + 12 + 16 + 4 + 4 + 4;

fn number(path: impl AsRef<Path>) -> Result<u64, Failure> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).map_err(Failure::system(format!("read {}", path.display())))?;
    text.trim().parse().map_err(|_| Failure::Words { what: path.display().to_string(), said: text })
}

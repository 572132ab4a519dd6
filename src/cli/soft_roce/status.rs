//! The status of a soft-RoCE device.

use std::fmt;
use std::net::IpAddr;

use crate::cli::preflight::{NetworkReadings, RdmaDevice};
use serde::Serialize;

/// The reported status of a device.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct DeviceStatus {
    pub(super) name: String,
    pub(super) netdev: String,
    /// The MTU of the network interface.
    netdev_mtu_bytes: Option<u32>,
    /// The bytes of a message that one packet carries.
    roce_mtu_bytes: Option<u32>,
    /// The port's state in the kernel's word.
    state: String,
    gid_index: Option<u32>,
    address: Option<IpAddr>,
    /// Whether a connection over it can be made.
    pub(super) ready: bool,
}

impl DeviceStatus {
    pub(super) fn of(device: &RdmaDevice, network: &NetworkReadings) -> Self {
        let port = device.ports.first();
        let gid = port.and_then(crate::cli::preflight::RdmaPort::roce_gid);
        let netdev_name = device.soft_roce_on.clone().unwrap_or_default();
        let netdev = network.netdev(&netdev_name);
        Self {
            name: device.name.clone(),
            netdev_mtu_bytes: netdev.map(|netdev| netdev.mtu_bytes),
            roce_mtu_bytes: netdev.map(crate::cli::preflight::Netdev::roce_mtu_bytes),
            netdev: netdev_name,
            state: port.map_or_else(|| "without a port".to_owned(), |port| port.state.clone()),
            gid_index: gid.map(|gid| gid.index),
            address: gid.map(|gid| IpAddr::V6(gid.address).to_canonical()),
            ready: gid.is_some() && port.is_some_and(crate::cli::preflight::RdmaPort::active),
        }
    }
}

impl fmt::Display for DeviceStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, netdev, state, .. } = self;
        write!(formatter, "{name} on {netdev}: {state}")?;
        match (self.gid_index, self.address) {
            (Some(index), Some(address)) => write!(formatter, ", GID {index} is RoCE v2 of {address}")?,
            _ => write!(formatter, ", no RoCE v2 address")?,
        }
        match (self.netdev_mtu_bytes, self.roce_mtu_bytes) {
            (Some(mtu), Some(payload)) => write!(formatter, ", {payload} bytes a packet (MTU {mtu})"),
            _ => Ok(()),
        }
    }
}

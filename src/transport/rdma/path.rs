use std::net::IpAddr;
use std::sync::Arc;

use sterna_rdma::{ConnectOptions, Device, Gid, GidChoice, Port};

use super::library::library;
use crate::transport::error::TransportError;

/// A device, one of its ports and an address on that port: the local end of RDMA.
#[derive(Clone, Debug)]
pub struct RdmaPath {
    pub(super) device: Arc<Device>,
    pub(super) port: Port,
    pub(super) gid: Gid,
}

impl RdmaPath {
    /// The device with `local_ip`, the address from which the peer is reached; hardware before soft-RoCE. If
    /// no device has it, and `otherwise_any`, any active device: the operator vouches for its network.
    ///
    /// # Errors
    /// [`TransportError::NoDevice`], with the devices found and the reason against each.
    pub fn find(local_ip: IpAddr, otherwise_any: bool) -> Result<Self, TransportError> {
        let mut passed_over = Vec::new();
        let mut found: Vec<Self> = Vec::new();
        let mut any: Vec<Self> = Vec::new();
        let unusable = |error| TransportError::NoDevice {
            reason: match error {
                sterna_rdma::Error::NoDevice => "there is none".into(),
                error => error.to_string(),
            },
        };
        let library = library().map_err(unusable)?;
        for info in library.devices().map_err(unusable)? {
            let opened = Device::open(&library, &info.name).and_then(|device| Ok((device.ports()?, device)));
            let (ports, device) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    passed_over.push(format!("{}: {error}", info.name));
                    continue;
                }
            };
            for port in ports {
                if !port.is_active() {
                    passed_over.push(format!("{} port {} is not active", info.name, port.number));
                    continue;
                }
                let path = |gid| Self { device: device.clone(), port: port.clone(), gid };
                match port.choose_gid(GidChoice::Address(local_ip)) {
                    Ok(gid) => found.push(path(gid)),
                    Err(_) => match port.choose_gid(GidChoice::Auto) {
                        Ok(gid) => {
                            passed_over.push(format!("{} has {} and not {local_ip}", info.name, gid.ip()));
                            any.push(path(gid));
                        }
                        Err(error) => passed_over.push(format!("{}: {error}", info.name)),
                    },
                }
            }
        }
        if otherwise_any {
            found.append(&mut any);
        }
        // A stable sort: of equals, the first in the library's order wins.
        found.sort_by_key(|path| (path.gid.ip() != local_ip, path.device.info().soft_roce));
        found.into_iter().next().ok_or_else(|| TransportError::NoDevice { reason: passed_over.join("; ") })
    }

    /// An IP address of this host that RDMA can reach, if any.
    #[must_use]
    pub fn any_address() -> Option<IpAddr> {
        let library = library().ok()?;
        library.devices().ok()?.into_iter().find_map(|info| {
            let ports = Device::open(&library, &info.name).and_then(|device| device.ports()).ok()?;
            ports.iter().filter(|port| port.is_active()).find_map(|port| {
                let ip = port.choose_gid(GidChoice::Auto).ok()?.ip();
                let link_local = matches!(ip, IpAddr::V6(address) if address.is_unicast_link_local());
                (!link_local && !ip.is_unspecified()).then_some(ip)
            })
        })
    }

    /// The connection parameters of queue pairs on this path. A peer that has gone should be noticed in
    /// seconds; the rxe driver treats the usual 7 retries as endless, so soft-RoCE has 6 of half a second
    /// each.
    pub(super) fn connect_options(&self) -> ConnectOptions {
        let usual = ConnectOptions::default();
        if !self.device.info().soft_roce {
            return usual;
        }
        ConnectOptions { ack_timeout: 17, retry_count: 6, ..usual }
    }

    pub(super) fn describe(&self) -> String {
        let kind = if self.device.info().soft_roce { "soft-RoCE, " } else { "" };
        format!("{} port {}, {kind}{}", self.device.name(), self.port.number, self.gid)
    }
}

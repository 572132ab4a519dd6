use std::net::IpAddr;
use std::sync::Arc;

use sterna_rdma::{ConnectOptions, Device, Gid, GidChoice, Port};

use super::library::library;
use crate::transport::error::TransportError;

/// A device, a port of it and an address on that port: from where RDMA starts on this host.
#[derive(Clone, Debug)]
pub struct RdmaPath {
    pub(super) device: Arc<Device>,
    pub(super) port: Port,
    pub(super) gid: Gid,
}

impl RdmaPath {
    /// The device that has `local_ip`, the address from which the peer is reached; hardware before soft-RoCE. Where none
    /// has it, and `otherwise_any`, an active device all the same, whose network the operator vouches for.
    ///
    /// # Errors
    /// [`TransportError::NoDevice`], which says what was found and why it will not do.
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
        // A stable sort: of equals, the first that the library named.
        found.sort_by_key(|path| (path.gid.ip() != local_ip, path.device.info().soft_roce));
        found.into_iter().next().ok_or_else(|| TransportError::NoDevice { reason: passed_over.join("; ") })
    }

    /// An IP address of this host at which RDMA arrives, if there is one.
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

    /// How queue pairs connect from here. A peer that has gone is to be noticed in seconds; the rxe driver takes the usual 7 retries
    /// for "for ever", so soft-RoCE has 6 of half a second each.
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

//! Decides what to do from the machine's readings; changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use crate::cli::preflight::{ModuleState, Netdev, RdmaDevice, Readings};
use thiserror::Error;

/// The input of the decisions.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) readings: Readings,
    /// The addresses of each interface; `None` if they could not be read.
    pub(super) addresses: Option<BTreeMap<String, Vec<IpAddr>>>,
}

/// How to bring a device up.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// The device exists.
    Already { name: String },
    /// Take these steps.
    Make { name: String, steps: Vec<Step> },
}

/// How to remove a device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// The device does not exist.
    NotThere,
    /// Take this step.
    Remove(Step),
}

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    LoadModule,
    AddLink { name: String, netdev: String },
    DeleteLink { name: String },
}

impl Step {
    /// The program and its arguments.
    pub(super) fn command(&self) -> Vec<&str> {
        match self {
            Self::LoadModule => vec!["modprobe", "rdma_rxe"],
            Self::AddLink { name, netdev } => {
                vec!["rdma", "link", "add", name, "type", "rxe", "netdev", netdev]
            }
            Self::DeleteLink { name } => vec!["rdma", "link", "delete", name],
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadModule => formatter.write_str("loaded the kernel module rdma_rxe"),
            Self::AddLink { name, netdev } => write!(formatter, "made {name} on {netdev}"),
            Self::DeleteLink { name } => write!(formatter, "removed {name}"),
        }
    }
}

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pid: u32,
    pub(super) program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} (process {})", self.program, self.pid)
    }
}

/// Why nothing was done.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Refusal {
    #[error("{name} is not a soft-RoCE device, and is left alone")]
    NotSoftRoce { name: String },
    #[error("{name} is there already, on {netdev}")]
    NameTaken { name: String, netdev: String },
    #[error("no default route tells which interface faces the other host; there are: {}", list(.known))]
    NoDefaultRoute { known: Vec<String> },
    #[error("there is no network interface {netdev}; there are: {}", list(.known))]
    NoSuchNetdev { netdev: String, known: Vec<String> },
    #[error("{netdev} is a loopback interface: no other host can be reached by it")]
    Loopback { netdev: String },
    #[error("{netdev} is a VLAN, and the kernel makes soft-RoCE devices on the interface below only")]
    Vlan { netdev: String },
    #[error("{netdev} is down, and so a device on it would be")]
    NetdevDown { netdev: String },
    #[error("{netdev} has no IP address, and RoCE version 2 travels in IP")]
    NoAddress { netdev: String },
    #[error("not permitted: RDMA devices are made and removed with CAP_NET_ADMIN{}", in_container(*.container))]
    NotPermitted { again: String, container: bool },
    #[error(
        "the program `rdma` is missing, which makes and removes soft-RoCE devices (iproute2 4.20 or newer)"
    )]
    NoRdmaProgram,
    #[error("the kernel {kernel} comes without the module rdma_rxe")]
    NoModule { kernel: String },
    #[error("{name} is in use by {}: removing it now would hang", list(.holders))]
    InUse { name: String, holders: Vec<Holder> },
}

impl Refusal {
    /// The command that removes the obstacle.
    pub(super) fn remedy(&self, facts: &Facts) -> Option<String> {
        let platform = &facts.readings.platform;
        let remedy = match self {
            Self::NotSoftRoce { .. } => "give another name with --name".to_owned(),
            Self::NameTaken { name, .. } => {
                format!(
                    "{}, or give another name with --name",
                    platform.as_root(&format!("sterna soft-roce down --name {name}"))
                )
            }
            Self::NoDefaultRoute { .. } | Self::NoSuchNetdev { .. } => {
                "name the interface that faces the other host: --netdev INTERFACE".to_owned()
            }
            Self::Loopback { .. } => format!(
                "to try RDMA within this machine: {} && {} && {}, and then --netdev veth0",
                platform.as_root("ip link add veth0 mtu 9000 up type veth peer name veth1"),
                platform.as_root("ip link set veth1 mtu 9000 up"),
                platform.as_root("ip address add 10.77.0.1/24 dev veth0")
            ),
            Self::Vlan { netdev } => format!(
                "`ip -d link show {netdev}` names the interface below after the @: --netdev INTERFACE"
            ),
            Self::NetdevDown { netdev } => platform.as_root(&format!("ip link set dev {netdev} up")),
            Self::NoAddress { netdev } => {
                platform.as_root(&format!("ip address add ADDRESS/PREFIX dev {netdev}"))
            }
            Self::NotPermitted { container: true, .. } => "run it on the host itself".to_owned(),
            Self::NotPermitted { again, .. } => format!("sudo {again}"),
            Self::NoRdmaProgram => platform.install_iproute(),
            Self::NoModule { .. } => platform.install_soft_roce_module(),
            Self::InUse { .. } => "end these first; `rdma resource show` lists what they hold".to_owned(),
        };
        Some(remedy)
    }
}

/// Decides how to bring up the soft-RoCE device `name`, on `netdev` or on the interface of the default route.
pub(super) fn up(facts: &Facts, netdev: Option<&str>, name: &str) -> Result<Plan, Refusal> {
    let devices = &facts.readings.rdma.devices;
    if let Some(device) = devices.iter().find(|device| device.name == name) {
        return already(device, netdev);
    }
    let netdev = choose_netdev(facts, netdev)?;
    let on_same = |device: &&RdmaDevice| device.soft_roce_on.as_ref() == Some(&netdev.name);
    if let Some(device) = devices.iter().find(on_same) {
        // The kernel allows one device per interface.
        return Ok(Plan::Already { name: device.name.clone() });
    }
    let again = format!("sterna soft-roce up --netdev {} --name {name}", netdev.name);
    require_tools(facts, again.clone())?;
    require_usable(facts, netdev)?;

    let mut steps = Vec::new();
    match facts.readings.rdma.soft_roce_module {
        ModuleState::Absent => {
            return Err(Refusal::NoModule { kernel: facts.readings.platform.kernel_release.clone() });
        }
        ModuleState::Loadable if !facts.readings.platform.privileges.sys_module => {
            return Err(Refusal::NotPermitted { again, container: facts.readings.platform.container });
        }
        ModuleState::Loadable => steps.push(Step::LoadModule),
        ModuleState::Present | ModuleState::Unknown => {}
    }
    steps.push(Step::AddLink { name: name.to_owned(), netdev: netdev.name.clone() });
    Ok(Plan::Make { name: name.to_owned(), steps })
}

/// Decides how to remove the soft-RoCE device `name`. `holders` returns the processes with a file of
/// `/dev/infiniband` open.
pub(super) fn down(
    facts: &Facts,
    name: &str,
    holders: impl Fn(&str) -> Vec<Holder>,
) -> Result<Removal, Refusal> {
    let Some(device) = facts.readings.rdma.devices.iter().find(|device| device.name == name) else {
        return Ok(Removal::NotThere);
    };
    if device.soft_roce_on.is_none() {
        return Err(Refusal::NotSoftRoce { name: name.to_owned() });
    }
    require_tools(facts, format!("sterna soft-roce down --name {name}"))?;
    let holders = device.verbs_file.as_deref().map(holders).unwrap_or_default();
    if !holders.is_empty() {
        return Err(Refusal::InUse { name: name.to_owned(), holders });
    }
    Ok(Removal::Remove(Step::DeleteLink { name: name.to_owned() }))
}

/// The remedy for a step that fails although the plan found no obstacle.
pub(super) fn remedy_of_failed(step: &Step, facts: &Facts) -> Option<String> {
    let platform = &facts.readings.platform;
    match step {
        // The kernel answers "Invalid argument" if it lacks this link type.
        Step::AddLink { .. } if facts.readings.rdma.soft_roce_module == ModuleState::Unknown => {
            Some(platform.install_soft_roce_module())
        }
        Step::AddLink { .. } | Step::LoadModule => {
            Some(format!("{} may say why", platform.as_root("dmesg | tail")))
        }
        Step::DeleteLink { .. } => {
            Some("end the programs that use it; `rdma resource show` lists what they hold".to_owned())
        }
    }
}

fn already(device: &RdmaDevice, netdev: Option<&str>) -> Result<Plan, Refusal> {
    let name = device.name.clone();
    match &device.soft_roce_on {
        None => Err(Refusal::NotSoftRoce { name }),
        Some(on) if netdev.is_some_and(|wanted| wanted != on) => {
            Err(Refusal::NameTaken { name, netdev: on.clone() })
        }
        Some(_) => Ok(Plan::Already { name }),
    }
}

fn choose_netdev<'facts>(facts: &'facts Facts, asked: Option<&str>) -> Result<&'facts Netdev, Refusal> {
    let network = &facts.readings.network;
    let usable = || network.netdevs.iter().filter(|netdev| !netdev.loopback && !netdev.vlan);
    let known = || usable().map(|netdev| netdev.name.clone()).collect();
    let Some(name) = asked.or(network.default_netdev.as_deref()) else {
        return Err(Refusal::NoDefaultRoute { known: known() });
    };
    let netdev = network
        .netdev(name)
        .ok_or_else(|| Refusal::NoSuchNetdev { netdev: name.to_owned(), known: known() })?;
    let netdev_name = netdev.name.clone();
    match netdev {
        Netdev { loopback: true, .. } => Err(Refusal::Loopback { netdev: netdev_name }),
        Netdev { vlan: true, .. } => Err(Refusal::Vlan { netdev: netdev_name }),
        _ => Ok(netdev),
    }
}

fn require_tools(facts: &Facts, again: String) -> Result<(), Refusal> {
    let platform = &facts.readings.platform;
    if !platform.privileges.net_admin {
        return Err(Refusal::NotPermitted {
            again,
            container: platform.container || platform.privileges.root,
        });
    }
    if !facts.readings.rdma.rdma_program {
        return Err(Refusal::NoRdmaProgram);
    }
    Ok(())
}

fn require_usable(facts: &Facts, netdev: &Netdev) -> Result<(), Refusal> {
    let name = &netdev.name;
    if !netdev.up {
        return Err(Refusal::NetdevDown { netdev: name.clone() });
    }
    let Some(addresses) = &facts.addresses else { return Ok(()) };
    let routed = |address: &IpAddr| match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    if addresses.get(name).is_some_and(|addresses| addresses.iter().any(routed)) {
        Ok(())
    } else {
        Err(Refusal::NoAddress { netdev: name.clone() })
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    if items.is_empty() {
        return "none".to_owned();
    }
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn in_container(container: bool) -> &'static str {
    if container { " of the host, which a container or a user namespace does not give" } else { "" }
}

#[cfg(test)]
mod tests;

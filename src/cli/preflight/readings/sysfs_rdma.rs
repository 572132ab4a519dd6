//! RDMA devices and the module of soft-RoCE, as the kernel shows them.

use std::net::{Ipv4Addr, Ipv6Addr};

use sterna::host::Tree;

/// An RDMA device as the kernel shows it in `/sys/class/infiniband`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RdmaDevice {
    /// Its name, such as `mlx5_0` or `rxe0`.
    pub(crate) name: String,
    /// For a soft-RoCE device, the network interface that it is made on.
    pub(crate) soft_roce_on: Option<String>,
    /// Whether it speaks iWARP, which uses another kind of connection than Sterna's.
    pub(crate) iwarp: bool,
    /// The name of its file in `/dev/infiniband`, such as `uverbs0`; None without the kernel module
    /// `ib_uverbs`.
    pub(crate) verbs_file: Option<String>,
    /// Its ports.
    pub(crate) ports: Vec<RdmaPort>,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RdmaPort {
    /// Its number, from 1.
    pub(crate) number: u8,
    /// Its state in the kernel's term, such as `ACTIVE` or `DOWN`.
    pub(crate) state: String,
    /// Whether its link is InfiniBand, addressed by LID; else it is Ethernet (RoCE), addressed by GID.
    pub(crate) infiniband: bool,
    /// The network interface behind it.
    pub(crate) netdev: Option<String>,
    /// Its table of GIDs, without the empty entries.
    pub(crate) gids: Vec<Gid>,
}

/// An entry of a port's table of GIDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gid {
    /// Its index in the table.
    pub(crate) index: u32,
    /// The address.
    pub(crate) address: Ipv6Addr,
    /// Whether it is a RoCE version 2 address, which travels in UDP; else version 1 or InfiniBand.
    pub(crate) roce_v2: bool,
}

/// Whether the kernel has a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ModuleState {
    /// Loaded or built in.
    Present,
    /// A file that `modprobe` will load.
    Loadable,
    /// This kernel has no such module.
    #[default]
    Absent,
    /// This machine has no description of the kernel's modules, and the module may be built in: only loading
    /// it would tell.
    Unknown,
}

/// The RDMA devices of this machine.
#[must_use]
pub(crate) fn rdma_devices() -> Vec<RdmaDevice> {
    read_devices(&Tree::machine())
}

pub(crate) fn read_devices(tree: &Tree) -> Vec<RdmaDevice> {
    tree.names("sys/class/infiniband").into_iter().map(|name| RdmaDevice::read(tree, name)).collect()
}

impl RdmaDevice {
    fn read(tree: &Tree, name: String) -> Self {
        let folder = format!("sys/class/infiniband/{name}");
        let verbs_file = tree.names("sys/class/infiniband_verbs").into_iter().find(|file| {
            tree.text(format!("sys/class/infiniband_verbs/{file}/ibdev")).as_deref() == Some(&name)
        });
        let mut ports: Vec<RdmaPort> = tree
            .names(format!("{folder}/ports"))
            .iter()
            .filter_map(|number| {
                RdmaPort::read(tree, &format!("{folder}/ports/{number}"), number.parse().ok()?)
            })
            .collect();
        ports.sort_by_key(|port| port.number);
        Self {
            // Only the driver rdma_rxe has this file.
            soft_roce_on: tree.text(format!("{folder}/parent")),
            // "1: CA" for InfiniBand and RoCE, "4: RNIC" for iWARP.
            iwarp: tree.text(format!("{folder}/node_type")).is_some_and(|kind| kind.starts_with("4:")),
            verbs_file,
            ports,
            name,
        }
    }
}

impl RdmaPort {
    fn read(tree: &Tree, folder: &str, number: u8) -> Option<Self> {
        // "4: ACTIVE"
        let state = tree.text(format!("{folder}/state"))?;
        let state = state.split_once(": ").map_or(state.as_str(), |(_, word)| word).to_owned();
        let mut indices: Vec<u32> =
            tree.names(format!("{folder}/gids")).iter().filter_map(|index| index.parse().ok()).collect();
        indices.sort_unstable();
        Some(Self {
            number,
            state,
            infiniband: tree.text(format!("{folder}/link_layer")).as_deref() == Some("InfiniBand"),
            netdev: indices.iter().find_map(|index| tree.text(format!("{folder}/gid_attrs/ndevs/{index}"))),
            gids: indices.into_iter().filter_map(|index| Gid::read(tree, folder, index)).collect(),
        })
    }

    /// Whether it can carry traffic now.
    #[must_use]
    pub(crate) fn active(&self) -> bool {
        self.state == "ACTIVE"
    }

    /// The GID for a RoCE connection: version 2, an IPv4 address before a routed IPv6 one; a link-local one
    /// does not count.
    #[must_use]
    pub(crate) fn roce_gid(&self) -> Option<Gid> {
        let mut usable = self.gids.iter().filter(|gid| gid.roce_v2 && !gid.link_local());
        let first = usable.clone().next().copied();
        usable.find(|gid| gid.ipv4().is_some()).copied().or(first)
    }
}

impl Gid {
    fn read(tree: &Tree, folder: &str, index: u32) -> Option<Self> {
        let address: Ipv6Addr = tree.text(format!("{folder}/gids/{index}"))?.parse().ok()?;
        // The kernel reports an error for the type of an empty entry.
        let kind = tree.text(format!("{folder}/gid_attrs/types/{index}"))?;
        (!address.is_unspecified()).then(|| Self { index, address, roce_v2: kind == "RoCE v2" })
    }

    /// The IPv4 address, if the entry maps one.
    #[must_use]
    pub(crate) fn ipv4(&self) -> Option<Ipv4Addr> {
        self.address.to_ipv4_mapped()
    }

    fn link_local(&self) -> bool {
        self.address.is_unicast_link_local()
    }
}

impl ModuleState {
    /// The state of `rdma_rxe`.
    pub(crate) fn of_soft_roce(tree: &Tree, devices: &[RdmaDevice]) -> Self {
        const FILE: &str = "/rdma_rxe.ko";
        let modules = format!("lib/modules/{}", tree.text("proc/sys/kernel/osrelease").unwrap_or_default());
        let lists = |list: &str| tree.text(format!("{modules}/{list}")).map(|text| text.contains(FILE));
        let in_use = devices.iter().any(|device| device.soft_roce_on.is_some());
        if in_use || tree.exists("sys/module/rdma_rxe") || lists("modules.builtin") == Some(true) {
            return Self::Present;
        }
        match lists("modules.dep") {
            Some(true) => Self::Loadable,
            Some(false) => Self::Absent,
            // It cannot be built in without the RDMA core, which has this folder.
            None if tree.exists("sys/class/infiniband") => Self::Unknown,
            None => Self::Absent,
        }
    }
}

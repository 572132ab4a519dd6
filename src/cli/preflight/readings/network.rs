//! Network interfaces, the default route, and the firewall.

use sterna::host::Tree;

/// The readings of network interfaces.
#[derive(Clone, Debug, Default)]
pub(crate) struct NetworkReadings {
    /// All interfaces of this network namespace, by name.
    pub(crate) netdevs: Vec<Netdev>,
    /// The interface of the default route.
    pub(crate) default_netdev: Option<String>,
    /// The active firewall manager, if any.
    pub(crate) firewall: Option<Firewall>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Netdev {
    /// Its name.
    pub(crate) name: String,
    /// The largest packet it sends, in bytes.
    pub(crate) mtu_bytes: u32,
    /// Whether it is set up (`ip link set … up`).
    pub(crate) up: bool,
    /// Whether it is up and has a link.
    pub(crate) carrier: bool,
    /// Whether it is a loopback interface.
    pub(crate) loopback: bool,
    /// Whether it is a VLAN on another interface.
    pub(crate) vlan: bool,
}

/// A manager of firewall rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firewall {
    /// firewalld.
    Firewalld,
    /// Uncomplicated Firewall.
    Ufw,
}

impl NetworkReadings {
    pub(crate) fn read(tree: &Tree) -> Self {
        Self {
            netdevs: tree
                .names("sys/class/net")
                .into_iter()
                .filter_map(|name| Netdev::read(tree, name))
                .collect(),
            default_netdev: read_default_route(tree),
            firewall: Firewall::read(tree),
        }
    }

    /// The interface of this name.
    #[must_use]
    pub(crate) fn netdev(&self, name: &str) -> Option<&Netdev> {
        self.netdevs.iter().find(|netdev| netdev.name == name)
    }
}

impl Netdev {
    fn read(tree: &Tree, name: String) -> Option<Self> {
        // Bits of linux/if.h.
        const IFF_UP: u32 = 1;
        const IFF_LOOPBACK: u32 = 8;
        let folder = format!("sys/class/net/{name}");
        let flags = tree.text(format!("{folder}/flags"))?;
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok()?;
        let kind = tree.text(format!("{folder}/uevent")).unwrap_or_default();
        Some(Self {
            mtu_bytes: tree.text(format!("{folder}/mtu"))?.parse().ok()?,
            up: flags & IFF_UP != 0,
            carrier: tree.text(format!("{folder}/carrier")).as_deref() == Some("1"),
            loopback: flags & IFF_LOOPBACK != 0,
            vlan: kind.lines().any(|line| line == "DEVTYPE=vlan"),
            name,
        })
    }

    /// The RoCE MTU that fits: the largest of 256, 512, … 4096 bytes that leaves 80 bytes of the interface's
    /// MTU for headers (Linux, drivers/infiniband/sw/rxe).
    #[must_use]
    pub(crate) fn roce_mtu_bytes(&self) -> u32 {
        let room = self.mtu_bytes.saturating_sub(80);
        [4096, 2048, 1024, 512].into_iter().find(|mtu| *mtu <= room).unwrap_or(256)
    }
}

impl Firewall {
    fn read(tree: &Tree) -> Option<Self> {
        if tree.exists("run/firewalld.pid") || tree.exists("run/firewalld") {
            return Some(Self::Firewalld);
        }
        let ufw = tree.text("etc/ufw/ufw.conf")?;
        ufw.lines().any(|line| line.trim().eq_ignore_ascii_case("ENABLED=yes")).then_some(Self::Ufw)
    }

    /// The command that opens UDP port 4791, the port of RoCE version 2.
    #[must_use]
    pub(crate) fn open_roce_port(self) -> &'static str {
        match self {
            Self::Firewalld => "firewall-cmd --add-port=4791/udp",
            Self::Ufw => "ufw allow 4791/udp",
        }
    }
}

/// Of the default routes of IPv4, else of IPv6, the one with the lowest metric.
fn read_default_route(tree: &Tree) -> Option<String> {
    const RTF_UP: u32 = 1;
    const RTF_REJECT: u32 = 0x200;
    let usable = |flags: &str| {
        u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & RTF_UP != 0 && flags & RTF_REJECT == 0)
    };
    // Iface Destination Gateway Flags RefCnt Use Metric Mask …
    let version_4 = tree.text("proc/net/route").unwrap_or_default();
    let version_4 = version_4.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let default =
            *columns.get(1)? == "00000000" && *columns.get(7)? == "00000000" && usable(columns.get(3)?);
        default.then_some((columns.get(6)?.parse::<u32>().ok()?, columns[0].to_owned()))
    });
    // destination length source length gateway metric references use flags interface; numbers are hexadecimal
    let version_6 = tree.text("proc/net/ipv6_route").unwrap_or_default();
    let version_6 = version_6.lines().filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let any = columns.first()?.bytes().all(|byte| byte == b'0');
        let default = any && *columns.get(1)? == "00" && usable(columns.get(8)?) && *columns.get(9)? != "lo";
        default.then_some((u32::from_str_radix(columns.get(5)?, 16).ok()?, columns.get(9)?.to_string()))
    });
    version_4.min().or_else(|| version_6.min()).map(|(_, name)| name)
}

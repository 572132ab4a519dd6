//! Checks of RDMA, from the library to the ports of each device.

use crate::cli::preflight::check::{Check, Outcome};
use crate::cli::preflight::readings::{
    ModuleState, Netdev, RdmaDevice, RdmaPort, RdmaReadings, Readings, VerbsLibrary,
};

pub(crate) fn judge(readings: &Readings) -> Vec<Check> {
    let rdma = &readings.rdma;
    let mut checks = vec![judge_library(readings)];
    for device in &rdma.devices {
        checks.extend(judge_device(readings, device));
    }
    if rdma.devices.is_empty() {
        checks.push(judge_no_device(readings));
    }
    if !rdma.devices.iter().any(|device| rdma.ready(device)) {
        checks.push(judge_module(readings));
        checks.push(judge_program(readings));
    }
    checks
}

fn judge_library(readings: &Readings) -> Check {
    const ID: &str = "rdma.library";
    match &readings.rdma.library {
        VerbsLibrary::Loaded(_) => Check::new(ID, Outcome::Pass, "libibverbs loads"),
        VerbsLibrary::Missing(reason) => {
            let outcome = if readings.rdma.devices.is_empty() { Outcome::Info } else { Outcome::Warn };
            Check::new(ID, outcome, format!("no libibverbs, so no RDMA: {reason}"))
                .mend(readings.platform.install_verbs())
        }
    }
}

/// From the outside in: the first fault hides those that depend on it.
fn judge_device(readings: &Readings, device: &RdmaDevice) -> Vec<Check> {
    const ID: &str = "rdma.device";
    let name = &device.name;
    if device.iwarp {
        return vec![Check::new(
            ID,
            Outcome::Info,
            format!("{name} speaks iWARP and is left alone: Sterna uses InfiniBand and RoCE"),
        )];
    }
    let VerbsLibrary::Loaded(_) = readings.rdma.library else {
        return vec![Check::new(
            ID,
            Outcome::Info,
            format!("the kernel has {name}, out of reach without the library"),
        )];
    };
    if device.verbs_file.is_none() {
        let found = format!("the kernel has {name} and no file in /dev/infiniband for it");
        return vec![
            Check::new(ID, Outcome::Warn, found).mend(readings.platform.as_root("modprobe ib_uverbs")),
        ];
    }
    let Some(verbs) = readings.rdma.verbs(device) else {
        let found = format!(
            "the kernel has {name}, libibverbs does not list it: its driver for user programs is missing"
        );
        return vec![Check::new(ID, Outcome::Warn, found).mend(readings.platform.install_verbs())];
    };
    let active_mtus = match &verbs.active_mtus {
        Ok(active_mtus) => active_mtus,
        Err(reason) => {
            return vec![
                Check::new(ID, Outcome::Warn, format!("{name} does not open: {reason}"))
                    .mend(open_remedy(readings, device)),
            ];
        }
    };
    let kind = match &device.soft_roce_on {
        Some(netdev) => format!("soft-RoCE on {netdev}, for tests and trusted links"),
        None => "RDMA hardware".to_owned(),
    };
    let mut checks = vec![Check::new(ID, Outcome::Pass, format!("{name} opens: {kind}"))];
    for port in &device.ports {
        let active_mtu_bytes =
            active_mtus.iter().find(|(number, _)| *number == port.number).map(|(_, mtu)| *mtu);
        checks.extend(judge_port(readings, device, port, active_mtu_bytes));
    }
    checks
}

fn open_remedy(readings: &Readings, device: &RdmaDevice) -> String {
    let file = device.verbs_file.as_deref().unwrap_or("uverbs0");
    if readings.platform.container {
        format!("start the container with --device /dev/infiniband/{file}")
    } else {
        readings.platform.as_root(&format!("chmod a+rw /dev/infiniband/{file}"))
    }
}

fn judge_port(
    readings: &Readings,
    device: &RdmaDevice,
    port: &RdmaPort,
    active_mtu_bytes: Option<u32>,
) -> Vec<Check> {
    let label = format!("{} port {}", device.name, port.number);
    let netdev = port.netdev.as_ref().or(device.soft_roce_on.as_ref());
    // An unused port of a card with a working port needs no warning.
    let outcome = if readings.rdma.devices.iter().any(|other| readings.rdma.ready(other)) {
        Outcome::Info
    } else {
        Outcome::Warn
    };
    if !port.active() {
        let remedy = match (port.infiniband, netdev) {
            (true, _) => "check the cable, and that a subnet manager runs (opensm)".to_owned(),
            (false, Some(netdev)) => readings.platform.as_root(&format!("ip link set dev {netdev} up")),
            (false, None) => "check the cable, and bring its network interface up".to_owned(),
        };
        return vec![Check::new("rdma.port", outcome, format!("{label} is {}", port.state)).mend(remedy)];
    }
    let mut checks = vec![Check::new("rdma.port", Outcome::Pass, format!("{label} is ACTIVE"))];
    if port.infiniband {
        return checks;
    }
    checks.push(match port.roce_gid() {
        Some(gid) => match gid.ipv4() {
            Some(address) => Check::new(
                "rdma.gid",
                Outcome::Pass,
                format!("{label}: GID {} is RoCE v2 of {address}", gid.index),
            ),
            None => Check::new(
                "rdma.gid",
                Outcome::Pass,
                format!("{label}: GID {} is RoCE v2 of {}", gid.index, gid.address),
            ),
        },
        None => {
            let netdev = netdev.map_or("INTERFACE", String::as_str);
            Check::new(
                "rdma.gid",
                outcome,
                format!("{label} has no RoCE v2 address: its interface has no IP address"),
            )
            .mend(readings.platform.as_root(&format!("ip address add ADDRESS/PREFIX dev {netdev}")))
        }
    });
    checks.extend(judge_mtu(readings, &label, netdev, active_mtu_bytes));
    checks
}

fn judge_mtu(
    readings: &Readings,
    label: &str,
    netdev: Option<&String>,
    active_mtu_bytes: Option<u32>,
) -> Option<Check> {
    const ID: &str = "rdma.mtu";
    let netdev = netdev.and_then(|name| readings.network.netdev(name));
    let mtu_bytes = active_mtu_bytes.or(netdev.map(Netdev::roce_mtu_bytes))?;
    if mtu_bytes >= 4096 {
        return Some(Check::new(ID, Outcome::Pass, format!("{label} sends {mtu_bytes} bytes a packet")));
    }
    let found = match netdev {
        Some(netdev) => format!(
            "{label} sends only {mtu_bytes} bytes a packet: {} has MTU {}, and 4096 need 4200",
            netdev.name, netdev.mtu_bytes
        ),
        None => format!("{label} sends only {mtu_bytes} bytes a packet, not 4096"),
    };
    Some(Check::new(ID, Outcome::Warn, found).mend(netdev.map(|netdev| {
        readings.platform.as_root(&format!("ip link set dev {} mtu 9000", netdev.name))
            + " (at both hosts, and where the switches between allow it)"
    })))
}

fn judge_no_device(readings: &Readings) -> Check {
    let RdmaReadings { library, soft_roce_module, rdma_program, .. } = &readings.rdma;
    // If one of these is missing, its own check gives the first remedy.
    let can_be_made = *rdma_program
        && *soft_roce_module != ModuleState::Absent
        && matches!(library, VerbsLibrary::Loaded(_));
    Check::new("rdma.device", Outcome::Info, "no RDMA device; guests move by TCP")
        .mend(can_be_made.then(|| make_device(readings) + " (RDMA in software, on an ordinary network card)"))
}

fn make_device(readings: &Readings) -> String {
    let netdev = if readings.network.default_netdev.is_some() { "" } else { " --netdev INTERFACE" };
    readings.platform.as_root(&format!("sterna soft-roce up{netdev}"))
}

fn judge_module(readings: &Readings) -> Check {
    const ID: &str = "rdma.soft_roce";
    let kernel = &readings.platform.kernel_release;
    match readings.rdma.soft_roce_module {
        ModuleState::Present => Check::new(ID, Outcome::Pass, "the kernel module rdma_rxe (soft-RoCE) is in"),
        ModuleState::Loadable => {
            Check::new(ID, Outcome::Pass, "the kernel module rdma_rxe (soft-RoCE) can be loaded")
        }
        ModuleState::Unknown => {
            Check::new(ID, Outcome::Info, "rdma_rxe (soft-RoCE) may be built into this kernel: trying tells")
                .mend(make_device(readings))
        }
        ModuleState::Absent => {
            Check::new(ID, Outcome::Info, format!("the kernel {kernel} comes without rdma_rxe (soft-RoCE)"))
                .mend(readings.platform.install_soft_roce_module())
        }
    }
}

fn judge_program(readings: &Readings) -> Check {
    const ID: &str = "rdma.program";
    if readings.rdma.rdma_program {
        Check::new(ID, Outcome::Pass, "iproute2's rdma is installed")
    } else {
        Check::new(ID, Outcome::Info, "no program `rdma`, which makes soft-RoCE devices")
            .mend(readings.platform.install_iproute())
    }
}

//! Checks of the network.

use crate::cli::preflight::check::{Check, Outcome};
use crate::cli::preflight::readings::{NetworkReadings, Readings};

pub(crate) fn judge(readings: &Readings) -> Vec<Check> {
    let mut checks = vec![judge_default_route(&readings.network)];
    let roce = readings.rdma.devices.iter().flat_map(|device| &device.ports).any(|port| !port.infiniband);
    if roce {
        checks.push(judge_roce_port(readings));
    }
    checks
}

fn judge_default_route(network: &NetworkReadings) -> Check {
    const ID: &str = "network.default_route";
    let Some(name) = &network.default_netdev else {
        let found = "no default route: name interfaces and addresses yourself (`--netdev`, `--to`)";
        return Check::new(ID, Outcome::Info, found);
    };
    match network.netdev(name) {
        Some(netdev) if !netdev.carrier => {
            Check::new(ID, Outcome::Warn, format!("{name}, of the default route, has no link"))
                .mend(format!("check the cable or the virtual switch; `ip link show {name}` shows the state"))
        }
        Some(netdev) => Check::new(ID, Outcome::Pass, format!("by {name}, MTU {}", netdev.mtu_bytes)),
        None => Check::new(ID, Outcome::Info, format!("by {name}")),
    }
}

fn judge_roce_port(readings: &Readings) -> Check {
    const ID: &str = "network.udp_4791";
    match readings.network.firewall {
        Some(firewall) => {
            Check::new(ID, Outcome::Info, "a firewall is at work, and RoCE comes in on UDP port 4791")
                .mend(readings.platform.as_root(firewall.open_roce_port()))
        }
        None => Check::new(
            ID,
            Outcome::Info,
            "RoCE comes in on UDP port 4791: any firewall between the hosts must let it pass",
        ),
    }
}

use sterna::host::Privileges;

use crate::cli::preflight::{NetworkReadings, Packages, Platform, RdmaPort, RdmaReadings, VerbsLibrary};

use super::*;

fn netdev(name: &str) -> Netdev {
    Netdev {
        name: name.to_owned(),
        mtu_bytes: 1500,
        up: true,
        carrier: true,
        loopback: name == "lo",
        vlan: name.contains('.'),
    }
}

fn rxe(name: &str, on: Option<&str>) -> RdmaDevice {
    let port = RdmaPort {
        number: 1,
        state: "ACTIVE".to_owned(),
        infiniband: false,
        netdev: on.map(str::to_owned),
        gids: vec![],
    };
    RdmaDevice {
        name: name.to_owned(),
        soft_roce_on: on.map(str::to_owned),
        iwarp: false,
        verbs_file: Some("uverbs0".to_owned()),
        ports: vec![port],
    }
}

/// Root on Debian, eth0 and eth1 with addresses, no device yet, the module a file.
fn facts() -> Facts {
    let address = |text: &str| vec![text.parse().expect("an address of the test")];
    Facts {
        readings: Readings {
            platform: Platform {
                kernel_release: "6.12".to_owned(),
                distribution: "debian".to_owned(),
                packages: Packages::Apt,
                container: false,
                privileges: Privileges { root: true, net_admin: true, ipc_lock: true, sys_module: true },
            },
            network: NetworkReadings {
                netdevs: ["eth0", "eth0.5", "eth1", "lo"].map(netdev).into(),
                default_netdev: Some("eth0".to_owned()),
                firewall: None,
            },
            rdma: RdmaReadings {
                devices: vec![],
                library: VerbsLibrary::Loaded(vec![]),
                soft_roce_module: ModuleState::Loadable,
                rdma_program: true,
            },
            ..Readings::default()
        },
        addresses: Some(BTreeMap::from([
            ("eth0".to_owned(), address("10.0.0.1")),
            ("eth1".to_owned(), address("2001:db8::1")),
        ])),
    }
}

fn add(name: &str, netdev: &str) -> Step {
    Step::AddLink { name: name.to_owned(), netdev: netdev.to_owned() }
}

fn make(name: &str, steps: &[Step]) -> Result<Plan, Refusal> {
    Ok(Plan::Make { name: name.to_owned(), steps: steps.to_vec() })
}

/// The refusal of `up` on the machine of `facts`, changed by `change`; its remedy must contain `remedy`.
#[track_caller]
fn refused(netdev: Option<&str>, remedy: &str, change: impl FnOnce(&mut Facts)) -> Refusal {
    let mut facts = facts();
    change(&mut facts);
    let refusal = up(&facts, netdev, "rxe0").expect_err("nothing is made on a machine like this");
    let found = refusal.remedy(&facts).unwrap_or_default();
    assert!(found.contains(remedy), "`{refusal}` mends by `{found}`, not `{remedy}`");
    refusal
}

#[test]
fn makes_the_device_on_the_interface_of_the_default_route() {
    assert_eq!(up(&facts(), None, "rxe0"), make("rxe0", &[Step::LoadModule, add("rxe0", "eth0")]));
    assert_eq!(
        add("rxe0", "eth0").command(),
        ["rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "eth0"]
    );
}

#[test]
fn makes_it_on_the_interface_asked_for() {
    assert_eq!(up(&facts(), Some("eth1"), "soft"), make("soft", &[Step::LoadModule, add("soft", "eth1")]));
}

#[test]
fn loads_no_module_that_is_in_or_may_be_built_in() {
    for state in [ModuleState::Present, ModuleState::Unknown] {
        let mut facts = facts();
        facts.readings.rdma.soft_roce_module = state;
        facts.readings.platform.privileges.sys_module = false;
        assert_eq!(up(&facts, None, "rxe0"), make("rxe0", &[add("rxe0", "eth0")]));
    }
}

#[test]
fn a_device_that_is_there_stays_even_without_privileges() {
    let mut facts = facts();
    facts.readings.rdma.devices = vec![rxe("rxe7", Some("eth0"))];
    facts.readings.platform.privileges = Privileges::default();
    let already = Ok(Plan::Already { name: "rxe7".to_owned() });
    assert_eq!(up(&facts, None, "rxe7"), already);
    assert_eq!(up(&facts, Some("eth0"), "rxe7"), already);
    assert_eq!(up(&facts, None, "rxe0"), already, "one to an interface");
}

#[test]
fn a_name_in_other_use_is_refused() {
    let on_eth1 = |f: &mut Facts| f.readings.rdma.devices = vec![rxe("rxe0", Some("eth1"))];
    assert!(matches!(
        refused(Some("eth0"), "soft-roce down --name rxe0", on_eth1),
        Refusal::NameTaken { .. }
    ));
    let hardware = |f: &mut Facts| f.readings.rdma.devices = vec![rxe("rxe0", None)];
    assert!(matches!(refused(None, "--name", hardware), Refusal::NotSoftRoce { .. }));
}

#[test]
fn an_interface_that_will_not_do_is_refused() {
    assert_eq!(
        refused(Some("eth9"), "--netdev", |_| ()).to_string(),
        "there is no network interface eth9; there are: eth0, eth1"
    );
    let no_route = |f: &mut Facts| f.readings.network.default_netdev = None;
    assert!(matches!(refused(None, "--netdev", no_route), Refusal::NoDefaultRoute { .. }));
    assert!(matches!(refused(Some("lo"), "type veth", |_| ()), Refusal::Loopback { .. }));
    assert!(matches!(refused(Some("eth0.5"), "ip -d link show eth0.5", |_| ()), Refusal::Vlan { .. }));
    let down = |f: &mut Facts| f.readings.network.netdevs[0].up = false;
    assert!(matches!(refused(None, "ip link set dev eth0 up", down), Refusal::NetdevDown { .. }));
}

#[test]
fn an_interface_without_an_address_is_refused() {
    let command = "ip address add ADDRESS/PREFIX dev eth0";
    let none = |f: &mut Facts| f.addresses = Some(BTreeMap::new());
    assert!(matches!(refused(None, command, none), Refusal::NoAddress { .. }));
    let link_local = |f: &mut Facts| {
        let address = "fe80::1".parse().expect("an address of the test");
        f.addresses = Some(BTreeMap::from([("eth0".to_owned(), vec![address])]));
    };
    assert!(matches!(refused(None, command, link_local), Refusal::NoAddress { .. }));
    // Addresses that could not be read are no reason to refuse.
    let mut unknown = facts();
    unknown.addresses = None;
    assert!(up(&unknown, None, "rxe0").is_ok());
}

#[test]
fn a_user_is_told_to_use_sudo_and_a_container_to_use_the_host() {
    let user = |f: &mut Facts| f.readings.platform.privileges = Privileges::default();
    assert!(matches!(
        refused(None, "sudo sterna soft-roce up --netdev eth0 --name rxe0", user),
        Refusal::NotPermitted { container: false, .. }
    ));
    let container = |f: &mut Facts| {
        f.readings.platform.container = true;
        f.readings.platform.privileges.net_admin = false;
    };
    refused(None, "on the host", container);
    refused(None, "sudo", |f| {
        f.readings.platform.privileges =
            Privileges { sys_module: false, net_admin: true, ..Privileges::default() }
    });
}

#[test]
fn missing_program_or_module_names_the_package() {
    assert_eq!(
        refused(None, "apt install iproute2", |f| f.readings.rdma.rdma_program = false),
        Refusal::NoRdmaProgram
    );
    let no_module = |f: &mut Facts| f.readings.rdma.soft_roce_module = ModuleState::Absent;
    assert!(matches!(refused(None, "apt install linux-image-", no_module), Refusal::NoModule { .. }));
    refused(None, "apt install linux-modules-extra-6.12", |f| {
        no_module(f);
        f.readings.platform.distribution = "ubuntu".to_owned();
    });
}

#[test]
fn a_failed_attempt_on_a_kernel_that_tells_nothing_names_the_module() {
    let mut facts = facts();
    facts.readings.rdma.soft_roce_module = ModuleState::Unknown;
    let remedy = remedy_of_failed(&add("rxe0", "eth0"), &facts).unwrap_or_default();
    assert!(remedy.contains("linux-image-"), "{remedy}");
}

#[test]
fn down_removes_soft_roce_devices_only() {
    let mut facts = facts();
    facts.readings.rdma.devices = vec![rxe("rxe0", Some("eth0")), rxe("mlx5_0", None)];
    let free = |_: &str| vec![];
    assert_eq!(down(&facts, "rxe0", free), Ok(Removal::Remove(Step::DeleteLink { name: "rxe0".to_owned() })));
    assert_eq!(down(&facts, "rxe1", free), Ok(Removal::NotThere));
    assert_eq!(down(&facts, "mlx5_0", free), Err(Refusal::NotSoftRoce { name: "mlx5_0".to_owned() }));
    facts.readings.platform.privileges = Privileges::default();
    assert!(matches!(down(&facts, "rxe0", free), Err(Refusal::NotPermitted { .. })));
}

#[test]
fn down_names_who_uses_the_device() {
    let mut facts = facts();
    facts.readings.rdma.devices = vec![rxe("rxe0", Some("eth0"))];
    let refusal = down(&facts, "rxe0", |file| {
        assert_eq!(file, "uverbs0");
        vec![Holder { pid: 42, program: "sterna".to_owned() }]
    });
    let refusal = refusal.expect_err("it is in use");
    assert_eq!(refusal.to_string(), "rxe0 is in use by sterna (process 42): removing it now would hang");
}

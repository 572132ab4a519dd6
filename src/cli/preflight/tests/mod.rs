//! Machines that are broken in one way each, and the resulting checks.

mod reading;

use sterna::host::{KvmAccess, Memlock, Privileges};

use super::readings::{Gid, KvmReadings, MemoryReadings, VerbsDevice};
use super::*;

/// A machine that lacks nothing: KVM by hardware, memory, a soft-RoCE device on eth0.
fn sound() -> Readings {
    Readings {
        platform: Platform {
            kernel_release: "6.12.0-1-amd64".to_owned(),
            distribution: "debian".to_owned(),
            packages: Packages::Apt,
            container: false,
            privileges: Privileges::default(),
        },
        kvm: KvmReadings {
            access: KvmAccess::Usable,
            capabilities: Some(KvmCapabilities { api_version: 12, manual_dirty_log_protect: 3 }),
            hardware: Some("vmx"),
            x86: true,
        },
        memory: MemoryReadings {
            available_bytes: Some(8 << 30),
            memlock: Memlock { limit_bytes: None, may_exceed: false },
            free_huge_pages: 512,
            huge_page_bytes: 2 << 20,
            max_mappings: Some(65_530),
        },
        network: NetworkReadings {
            netdevs: vec![Netdev {
                name: "eth0".to_owned(),
                mtu_bytes: 9000,
                up: true,
                carrier: true,
                loopback: false,
                vlan: false,
            }],
            default_netdev: Some("eth0".to_owned()),
            firewall: None,
        },
        rdma: RdmaReadings {
            devices: vec![rxe0()],
            library: VerbsLibrary::Loaded(vec![VerbsDevice {
                name: "rxe0".to_owned(),
                active_mtus: Ok(vec![(1, 4096)]),
            }]),
            soft_roce_module: ModuleState::Present,
            rdma_program: true,
        },
    }
}

fn rxe0() -> RdmaDevice {
    RdmaDevice {
        name: "rxe0".to_owned(),
        soft_roce_on: Some("eth0".to_owned()),
        iwarp: false,
        verbs_file: Some("uverbs0".to_owned()),
        ports: vec![RdmaPort {
            number: 1,
            state: "ACTIVE".to_owned(),
            infiniband: false,
            netdev: Some("eth0".to_owned()),
            gids: vec![gid(0, "fe80::1"), gid(1, "::ffff:10.0.0.1")],
        }],
    }
}

fn gid(index: u32, address: &str) -> Gid {
    Gid { index, address: address.parse().expect("an address of the test"), roce_v2: true }
}

fn without_device() -> Readings {
    let mut readings = sound();
    readings.rdma.devices.clear();
    readings.rdma.library = VerbsLibrary::Loaded(vec![]);
    readings
}

/// The checks of this id.
fn checks(readings: &Readings, id: &str) -> Vec<Check> {
    judge(readings).into_iter().filter(|check| check.id == id).collect()
}

fn check(readings: &Readings, id: &str) -> Check {
    let mut found = checks(readings, id);
    assert_eq!(found.len(), 1, "checks {id} in {:#?}", judge(readings));
    found.remove(0)
}

/// The sound machine, broken by `broken`: one check of `id` ends as `outcome` and its remedy contains
/// `remedy`.
#[track_caller]
fn assert_found(id: &str, outcome: Outcome, remedy: &str, broken: impl FnOnce(&mut Readings)) -> Check {
    let mut readings = sound();
    broken(&mut readings);
    let check = check(&readings, id);
    assert_eq!(check.outcome, outcome, "{check:?}");
    assert!(
        check.remedy.as_deref().unwrap_or_default().contains(remedy),
        "{check:?} should mend by `{remedy}`"
    );
    check
}

#[test]
fn a_sound_machine_has_nothing_to_mend() {
    let checks = judge(&sound());
    assert!(
        checks.iter().all(|check| check.outcome <= Outcome::Info && check.remedy.is_none()),
        "{checks:#?}"
    );
    let transports = Transports::of(&sound());
    assert_eq!(
        (transports.rdma.len(), transports.soft_roce, transports.tcp),
        (0, vec!["rxe0".to_owned()], true)
    );
}

#[test]
fn every_warning_and_failure_has_a_remedy() {
    let breakers: [fn(&mut Readings); 6] = [
        |readings| *readings = Readings::default(),
        |readings| readings.kvm.access = KvmAccess::Other("Input/output error".to_owned()),
        |readings| {
            readings.kvm.capabilities =
                Some(KvmCapabilities { api_version: 11, manual_dirty_log_protect: 0 });
        },
        |readings| readings.rdma.devices[0].ports[0].gids.clear(),
        |readings| readings.rdma.devices[0].ports[0].state = "DOWN".to_owned(),
        |readings| readings.network.netdevs[0].carrier = false,
    ];
    for breaker in breakers {
        let mut readings = sound();
        breaker(&mut readings);
        for check in judge(&readings) {
            assert!(check.outcome < Outcome::Warn || check.remedy.is_some(), "{check:?}");
        }
    }
}

#[test]
fn kvm_missing_names_the_processors_driver() {
    assert_found("kvm.access", Outcome::Warn, "sudo modprobe kvm_intel", |r| {
        r.kvm.access = KvmAccess::Missing;
    });
    assert_found("kvm.access", Outcome::Warn, "sudo modprobe kvm_amd", |r| {
        r.kvm =
            KvmReadings { access: KvmAccess::Missing, capabilities: None, hardware: Some("svm"), x86: true };
    });
    assert_found("kvm.access", Outcome::Warn, "nested virtualisation", |r| {
        r.kvm = KvmReadings { access: KvmAccess::NoDriver, capabilities: None, hardware: None, x86: true };
    });
    assert_found("kvm.access", Outcome::Warn, "--device /dev/kvm", |r| {
        r.kvm.access = KvmAccess::Missing;
        r.platform.container = true;
    });
}

#[test]
fn kvm_denied_names_the_group() {
    assert_found("kvm.access", Outcome::Fail, "sudo usermod -aG kvm", |r| r.kvm.access = KvmAccess::Denied);
}

#[test]
fn nothing_more_is_said_of_a_kvm_that_does_not_open() {
    let mut readings = sound();
    readings.kvm.access = KvmAccess::Denied;
    assert!(checks(&readings, "kvm.dirty_log").is_empty());
}

#[test]
fn kvm_of_another_api_or_an_old_dirty_log() {
    let capabilities = |api_version, manual_dirty_log_protect| {
        move |r: &mut Readings| {
            r.kvm.capabilities = Some(KvmCapabilities { api_version, manual_dirty_log_protect });
        }
    };
    assert_found("kvm.access", Outcome::Fail, "Linux", capabilities(11, 3));
    assert_found("kvm.dirty_log", Outcome::Fail, "Linux 5.7", capabilities(12, 0));
    assert_found("kvm.dirty_log", Outcome::Warn, "Linux 5.7", capabilities(12, 1));
}

#[test]
fn kvm_by_software_is_told_but_not_warned_of() {
    assert_found("kvm.hardware", Outcome::Info, "", |r| r.kvm.hardware = None);
}

#[test]
fn memory_is_scarce() {
    assert_found("memory.available", Outcome::Warn, "ps -eo rss", |r| {
        r.memory.available_bytes = Some(100 << 20);
    });
}

#[test]
fn memlock_is_too_low_unless_the_process_may_exceed_it() {
    let limit = |may_exceed| Memlock { limit_bytes: Some(8 << 20), may_exceed };
    let check = assert_found("memory.locked", Outcome::Warn, "sudo prlimit --pid $$", |r| {
        r.memory.memlock = limit(false);
    });
    assert!(check.found.contains("8 MiB"), "{check:?}");
    assert_found("memory.locked", Outcome::Warn, "--ulimit memlock=-1", |r| {
        r.memory.memlock = limit(false);
        r.platform.container = true;
    });
    assert_found("memory.locked", Outcome::Pass, "", |r| r.memory.memlock = limit(true));
    // Nothing would lock memory: no false alarm.
    let mut readings = without_device();
    readings.memory.memlock = limit(false);
    assert_eq!(self::check(&readings, "memory.locked").outcome, Outcome::Info);

    assert!(limit(true).allows(1 << 40));
    assert!(limit(false).allows(8 << 20) && !limit(false).allows((8 << 20) + 1));
}

#[test]
fn huge_pages_and_mappings() {
    assert_found("memory.huge_pages", Outcome::Info, "sudo sysctl vm.nr_hugepages=512", |r| {
        r.memory.free_huge_pages = 0;
    });
    assert_found("memory.mappings", Outcome::Warn, "sudo sysctl vm.max_map_count=", |r| {
        r.memory.max_mappings = Some(1000);
    });
}

#[test]
fn verbs_library_missing() {
    let missing = |r: &mut Readings| r.rdma.library = VerbsLibrary::Missing("no such file".to_owned());
    assert_found("rdma.library", Outcome::Warn, "sudo apt install libibverbs1 ibverbs-providers", missing);
    assert_found("rdma.library", Outcome::Warn, "sudo dnf install libibverbs", |r| {
        missing(r);
        r.platform.packages = Packages::Dnf;
    });
    // Without a device to drive, that is no fault.
    let mut readings = without_device();
    missing(&mut readings);
    assert_eq!(check(&readings, "rdma.library").outcome, Outcome::Info);
    assert_eq!(Transports::of(&readings), Transports { tcp: true, ..Transports::default() });
}

#[test]
fn the_library_does_not_list_the_kernels_device() {
    assert_found("rdma.device", Outcome::Warn, "ibverbs-providers", |r| {
        r.rdma.library = VerbsLibrary::Loaded(vec![]);
    });
}

#[test]
fn the_device_has_no_file_or_does_not_open() {
    assert_found("rdma.device", Outcome::Warn, "sudo modprobe ib_uverbs", |r| {
        r.rdma.devices[0].verbs_file = None;
    });
    let denied = |r: &mut Readings| {
        let active_mtus = Err("Permission denied".to_owned());
        r.rdma.library = VerbsLibrary::Loaded(vec![VerbsDevice { name: "rxe0".to_owned(), active_mtus }]);
    };
    assert_found("rdma.device", Outcome::Warn, "/dev/infiniband/uverbs0", denied);
    let mut readings = sound();
    denied(&mut readings);
    assert!(Transports::of(&readings).soft_roce.is_empty());
}

#[test]
fn no_device_but_soft_roce_can_be_had() {
    let mut readings = without_device();
    for state in [ModuleState::Loadable, ModuleState::Present, ModuleState::Unknown] {
        readings.rdma.soft_roce_module = state;
        let check = check(&readings, "rdma.device");
        assert_eq!(check.outcome, Outcome::Info);
        assert!(check.remedy.is_some_and(|remedy| remedy.starts_with("sudo sterna soft-roce up (")));
    }
    readings.network.default_netdev = None;
    let remedy = check(&readings, "rdma.device").remedy;
    assert!(remedy.is_some_and(|remedy| remedy.contains("up --netdev INTERFACE")));
}

#[test]
fn no_device_and_no_module() {
    let mut readings = without_device();
    readings.rdma.soft_roce_module = ModuleState::Absent;
    assert_eq!(check(&readings, "rdma.device").remedy, None);
    let mut remedy = |distribution: &str, packages| {
        readings.platform.distribution = distribution.to_owned();
        readings.platform.packages = packages;
        check(&readings, "rdma.soft_roce").remedy.unwrap_or_default()
    };
    assert!(remedy("debian", Packages::Apt).starts_with("sudo apt install linux-image-"));
    assert_eq!(remedy("ubuntu", Packages::Apt), "sudo apt install linux-modules-extra-6.12.0-1-amd64");
    assert_eq!(remedy("fedora", Packages::Dnf), "sudo dnf install kernel-modules-extra-6.12.0-1-amd64");
    assert!(remedy("gentoo", Packages::Other).contains("CONFIG_RDMA_RXE"));
}

#[test]
fn no_device_and_no_program_to_make_one() {
    let mut readings = without_device();
    readings.rdma.rdma_program = false;
    assert_eq!(check(&readings, "rdma.program").remedy.as_deref(), Some("sudo apt install iproute2"));
    assert_eq!(check(&readings, "rdma.device").remedy, None, "one thing after the other");
}

#[test]
fn port_down() {
    assert_found("rdma.port", Outcome::Warn, "sudo ip link set dev eth0 up", |r| {
        r.rdma.devices[0].ports[0].state = "DOWN".to_owned();
    });
    // The second port of a card with a working first port.
    let mut readings = sound();
    let unused =
        RdmaPort { number: 2, state: "DOWN".to_owned(), ..readings.rdma.devices[0].ports[0].clone() };
    readings.rdma.devices[0].ports.push(unused);
    let outcomes: Vec<Outcome> = checks(&readings, "rdma.port").iter().map(|check| check.outcome).collect();
    assert_eq!(outcomes, [Outcome::Pass, Outcome::Info]);
}

#[test]
fn no_gid_that_can_be_reached() {
    let no_address = |r: &mut Readings| r.rdma.devices[0].ports[0].gids = vec![gid(0, "fe80::1")];
    assert_found("rdma.gid", Outcome::Warn, "sudo ip address add ADDRESS/PREFIX dev eth0", no_address);
    assert_found("rdma.gid", Outcome::Warn, "ip address add", |r| {
        r.rdma.devices[0].ports[0].gids[1].roce_v2 = false;
    });
    let mut readings = sound();
    no_address(&mut readings);
    assert!(Transports::of(&readings).soft_roce.is_empty());
}

#[test]
fn the_gid_of_ipv4_comes_before_that_of_ipv6() {
    let mut port = rxe0().ports.remove(0);
    port.gids = vec![gid(0, "fe80::1"), gid(1, "2001:db8::1"), gid(2, "::ffff:10.0.0.1")];
    assert_eq!(port.roce_gid().map(|gid| gid.index), Some(2));
    port.gids.pop();
    assert_eq!(port.roce_gid().map(|gid| gid.index), Some(1));
}

#[test]
fn small_mtu() {
    let check = assert_found("rdma.mtu", Outcome::Warn, "sudo ip link set dev eth0 mtu 9000", |r| {
        r.network.netdevs[0].mtu_bytes = 1500;
        r.rdma.library = VerbsLibrary::Loaded(vec![VerbsDevice {
            name: "rxe0".to_owned(),
            active_mtus: Ok(vec![(1, 1024)]),
        }]);
    });
    assert!(check.found.contains("1024"), "{check:?}");
}

#[test]
fn roce_mtu_is_what_fits_the_interface() {
    let payload = |mtu_bytes| Netdev { mtu_bytes, ..sound().network.netdevs.remove(0) }.roce_mtu_bytes();
    assert_eq!([1280, 1400, 1500, 4175, 4176, 9000].map(payload), [1024, 1024, 1024, 2048, 4096, 4096]);
}

#[test]
fn infiniband_needs_no_gid_and_its_port_a_subnet_manager() {
    let infiniband = |r: &mut Readings| {
        let device = &mut r.rdma.devices[0];
        device.soft_roce_on = None;
        device.ports[0].infiniband = true;
        device.ports[0].gids.clear();
    };
    let mut readings = sound();
    infiniband(&mut readings);
    assert_eq!(Transports::of(&readings).rdma, ["rxe0"]);
    assert!(checks(&readings, "rdma.gid").is_empty());
    assert_found("rdma.port", Outcome::Warn, "opensm", |r| {
        infiniband(r);
        r.rdma.devices[0].ports[0].state = "INIT".to_owned();
    });
}

#[test]
fn iwarp_is_left_alone() {
    let mut readings = sound();
    readings.rdma.devices[0].iwarp = true;
    assert_eq!(check(&readings, "rdma.device").outcome, Outcome::Info);
    assert_eq!(Transports::of(&readings), Transports { tcp: true, ..Transports::default() });
}

#[test]
fn a_firewall_gets_its_own_command() {
    let with = |firewall| move |r: &mut Readings| r.network.firewall = Some(firewall);
    assert_found("network.udp_4791", Outcome::Info, "sudo ufw allow 4791/udp", with(Firewall::Ufw));
    assert_found(
        "network.udp_4791",
        Outcome::Info,
        "firewall-cmd --add-port=4791/udp",
        with(Firewall::Firewalld),
    );
    assert!(checks(&without_device(), "network.udp_4791").is_empty());
}

#[test]
fn no_sudo_for_root() {
    let mut readings = sound();
    readings.platform.privileges.root = true;
    readings.rdma.devices[0].verbs_file = None;
    assert_eq!(check(&readings, "rdma.device").remedy.as_deref(), Some("modprobe ib_uverbs"));
}

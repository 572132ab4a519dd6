//! Machines made of files, and the readings taken from them.

use std::fs;
use std::os::unix::fs::symlink;

use sterna::host::Tree;
use tempfile::TempDir;

use super::*;
use crate::cli::preflight::readings::read_devices;

/// A machine of files.
fn machine(files: &[(&str, &str)]) -> (TempDir, Tree) {
    let folder = TempDir::new().expect("a temporary folder");
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().expect("a path below the root")).expect("folders");
        fs::write(path, text).expect("a file");
    }
    let tree = Tree::at(folder.path());
    (folder, tree)
}

const MEMINFO: &str =
    "MemTotal: 8000000 kB\nMemAvailable:  4000000 kB\nHugePages_Free:   3\nHugepagesize:  2048 kB\n";

#[test]
fn nothing_is_there() {
    let (_folder, tree) = machine(&[]);
    assert_eq!(KvmReadings::read(&tree).access, KvmAccess::Missing);
    assert_eq!(MemoryReadings::read(&tree).available_bytes, None);
    assert!(NetworkReadings::read(&tree).netdevs.is_empty());
    assert_eq!(ModuleState::of_soft_roce(&tree, &[]), ModuleState::Absent);
}

#[test]
fn available_memory_without_control_groups() {
    let (_folder, tree) = machine(&[("proc/meminfo", MEMINFO)]);
    let memory = MemoryReadings::read(&tree);
    assert_eq!(memory.available_bytes, Some(4_000_000 * 1024));
    assert_eq!((memory.free_huge_pages, memory.huge_page_bytes), (3, 2 << 20));
}

#[test]
fn a_version_2_control_group_above_limits() {
    let (_folder, tree) = machine(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "0::/outer/inner\n"),
        ("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"),
        ("sys/fs/cgroup/outer/memory.max", "1000000\n"),
        ("sys/fs/cgroup/outer/memory.current", "700000\n"),
        ("sys/fs/cgroup/outer/memory.stat", "anon 1\ninactive_file 50000\n"),
        ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
        ("sys/fs/cgroup/outer/inner/memory.current", "5\n"),
    ]);
    assert_eq!(MemoryReadings::read(&tree).available_bytes, Some(350_000));
}

#[test]
fn a_control_group_that_is_slowed_down_above_a_limit_has_no_more_than_that() {
    let group = |limits: [(&str, &str); 2]| {
        let files = limits.map(|(name, limit)| (format!("sys/fs/cgroup/inner/{name}"), limit));
        let mut all = vec![
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/inner\n"),
            ("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/inner/memory.current", "100000\n"),
        ];
        all.extend(files.iter().map(|(path, limit)| (path.as_str(), *limit)));
        let (_folder, tree) = machine(&all);
        MemoryReadings::read(&tree).available_bytes
    };
    assert_eq!(group([("memory.max", "max\n"), ("memory.high", "500000\n")]), Some(400_000));
    assert_eq!(group([("memory.max", "900000\n"), ("memory.high", "500000\n")]), Some(400_000));
    assert_eq!(group([("memory.max", "300000\n"), ("memory.high", "max\n")]), Some(200_000));
}

#[test]
fn memory_in_use_is_what_a_process_has_itself_and_shares() {
    let status = "VmRSS:  70 kB\nRssAnon:\t  10 kB\nRssFile:  40 kB\nRssShmem:    20 kB\n";
    let (_folder, tree) = machine(&[("proc/self/status", status)]);
    assert_eq!(sterna::host::read_resident(&tree), 30 << 10);
    assert_eq!(sterna::host::read_resident(&machine(&[]).1), 0);
}

#[test]
fn a_version_1_control_group_seen_from_a_container() {
    let (_folder, tree) = machine(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "4:cpu,memory:/docker/a\n0::/\n"),
        (
            "proc/self/mountinfo",
            "35 31 0:32 /docker/a /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n",
        ),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n"),
    ]);
    assert_eq!(MemoryReadings::read(&tree).available_bytes, Some(500_000));
}

#[test]
fn privileges_and_the_limit_on_locked_memory() {
    let limits = "Max locked memory         8388608              unlimited            bytes\n";
    let status = "Name:\tsterna\nUid:\t0\t0\t0\t0\nCapEff:\t0000000000004000\n";
    let (folder, tree) = machine(&[("proc/self/limits", limits), ("proc/self/status", status)]);
    assert_eq!(
        MemoryReadings::read(&tree).memlock,
        Memlock { limit_bytes: Some(8_388_608), may_exceed: true }
    );
    let privileges = Privileges::read(&tree);
    assert_eq!((privileges.root, privileges.ipc_lock, privileges.net_admin), (true, true, false));

    // The same in a user namespace, which grants no such privilege.
    fs::write(folder.path().join("proc/self/uid_map"), "         0       1000          1\n").expect("a file");
    assert!(!Privileges::read(&tree).ipc_lock);
    fs::write(folder.path().join("proc/self/limits"), "Max locked memory unlimited unlimited bytes")
        .expect("a file");
    assert_eq!(MemoryReadings::read(&tree).memlock.limit_bytes, None);
}

#[test]
fn a_container_has_a_pid_namespace_of_its_own() {
    let (folder, tree) = machine(&[("proc/self/ns/net", ""), (".dockerenv", "")]);
    assert!(!Platform::read(&tree).container);
    let namespace = folder.path().join("proc/self/ns/pid");
    for (target, container) in [("pid:[4026531836]", false), ("pid:[4026532251]", true)] {
        symlink(target, &namespace).expect("a link");
        assert_eq!(Platform::read(&tree).container, container, "{target}");
        fs::remove_file(&namespace).expect("the link is there");
    }
}

#[test]
fn distributions() {
    for (release, packages) in [
        ("ID=debian\n", Packages::Apt),
        ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Packages::Apt),
        ("NAME=x\nID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", Packages::Dnf),
        ("ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", Packages::Zypper),
        ("ID=arch\n", Packages::Pacman),
        ("ID=nixos\n", Packages::Other),
    ] {
        let (_folder, tree) = machine(&[("etc/os-release", release)]);
        assert_eq!(Platform::read(&tree).packages, packages, "{release}");
    }
}

#[test]
fn a_soft_roce_device_in_sysfs() {
    let port = |file: &str| format!("sys/class/infiniband/rxe0/ports/1/{file}");
    let files = [
        ("sys/class/infiniband/rxe0/parent".to_owned(), "eth0\n"),
        ("sys/class/infiniband/rxe0/node_type".to_owned(), "1: CA\n"),
        ("sys/class/infiniband_verbs/uverbs3/ibdev".to_owned(), "rxe0\n"),
        ("sys/class/infiniband_verbs/abi_version".to_owned(), "6\n"),
        (port("state"), "4: ACTIVE\n"),
        (port("link_layer"), "Ethernet\n"),
        (port("gids/0"), "fe80:0000:0000:0000:0000:0000:0000:0001\n"),
        (port("gids/1"), "0000:0000:0000:0000:0000:ffff:0a4d:0001\n"),
        (port("gids/2"), "0000:0000:0000:0000:0000:0000:0000:0000\n"),
        (port("gid_attrs/types/0"), "RoCE v2\n"),
        (port("gid_attrs/types/1"), "RoCE v2\n"),
        (port("gid_attrs/ndevs/0"), "eth0\n"),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
    let (_folder, tree) = machine(&files);
    let devices = read_devices(&tree);
    let mut expected = rxe0();
    expected.verbs_file = Some("uverbs3".to_owned());
    expected.ports[0].gids[1] = gid(1, "::ffff:10.77.0.1");
    assert_eq!(devices, [expected]);
    assert_eq!(ModuleState::of_soft_roce(&tree, &devices), ModuleState::Present);
}

#[test]
fn the_module_of_soft_roce() {
    let release = ("proc/sys/kernel/osrelease", "6.1\n");
    let state = |files: &[(&str, &str)]| {
        let (_folder, tree) = machine(files);
        ModuleState::of_soft_roce(&tree, &[])
    };
    let dependencies = "kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko.xz: kernel/net/ipv4/udp_tunnel.ko.xz\n";
    assert_eq!(state(&[release, ("lib/modules/6.1/modules.dep", dependencies)]), ModuleState::Loadable);
    assert_eq!(state(&[release, ("lib/modules/6.1/modules.dep", "kernel/a.ko:\n")]), ModuleState::Absent);
    let built_in = "kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko\n";
    assert_eq!(state(&[release, ("lib/modules/6.1/modules.builtin", built_in)]), ModuleState::Present);
    assert_eq!(state(&[release, ("sys/module/rdma_rxe/refcnt", "0")]), ModuleState::Present);
    assert_eq!(state(&[release, ("sys/class/infiniband/none", "")]), ModuleState::Unknown);
    assert_eq!(state(&[release]), ModuleState::Absent);
}

#[test]
fn interfaces_and_the_default_route() {
    let route = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                 wlan0\t00000000\t010200C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                 eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                 eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
    let route_6 = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                   fe800000000000000000000000000001 00000400 00000000 00000000 00000003     eth6\n\
                   00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                   00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
    let (folder, tree) = machine(&[
        ("proc/net/route", route),
        ("proc/net/ipv6_route", route_6),
        ("sys/class/net/eth0/flags", "0x1003\n"),
        ("sys/class/net/eth0/mtu", "1500\n"),
        ("sys/class/net/eth0/carrier", "1\n"),
        ("sys/class/net/eth0.5/flags", "0x1002\n"),
        ("sys/class/net/eth0.5/mtu", "1500\n"),
        ("sys/class/net/eth0.5/uevent", "DEVTYPE=vlan\nINTERFACE=eth0.5\n"),
        ("sys/class/net/lo/flags", "0x9\n"),
        ("sys/class/net/lo/mtu", "65536\n"),
        ("sys/class/net/bonding_masters", "\n"),
    ]);
    let network = NetworkReadings::read(&tree);
    assert_eq!(network.default_netdev.as_deref(), Some("eth0"));
    let facts: Vec<_> =
        network.netdevs.iter().map(|n| (n.name.as_str(), n.up, n.carrier, n.loopback, n.vlan)).collect();
    assert_eq!(
        facts,
        [
            ("eth0", true, true, false, false),
            ("eth0.5", false, false, false, true),
            ("lo", true, false, true, false)
        ]
    );
    fs::remove_file(folder.path().join("proc/net/route")).expect("the file is there");
    assert_eq!(NetworkReadings::read(&tree).default_netdev.as_deref(), Some("eth6"));
}

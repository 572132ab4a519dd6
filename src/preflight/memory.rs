use std::path::{Path, PathBuf};

use super::platform::Privileges;
use super::tree::{Tree, field};
use super::{Check, Outcome, Readings};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Below this even a small guest does not fit.
const SCARCE_BYTES: u64 = 512 * MIB;
/// The kernel's default of `vm.max_map_count`.
const DEFAULT_MAPPINGS: u64 = 65_530;

/// The readings of memory and its limits.
#[derive(Clone, Debug, Default)]
pub struct MemoryReadings {
    /// As returned by [`available_memory_bytes`].
    pub available_bytes: Option<u64>,
    /// How much memory may be locked.
    pub memlock: Memlock,
    /// Free pages of the default huge page size.
    pub free_huge_pages: u64,
    /// The default huge page size.
    pub huge_page_bytes: u64,
    /// `vm.max_map_count`: how many mappings a process may have.
    pub max_mappings: Option<u64>,
}

/// How much memory this process may lock, which RDMA does with all guest RAM that it registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memlock {
    /// The soft `RLIMIT_MEMLOCK`; None if unlimited.
    pub limit_bytes: Option<u64>,
    /// Whether the process may lock more than that (`CAP_IPC_LOCK`).
    pub may_exceed: bool,
}

impl Memlock {
    /// Whether `len_bytes` can be locked, if nothing else is.
    #[must_use]
    pub fn allows(&self, len_bytes: u64) -> bool {
        self.may_exceed || self.limit_bytes.is_none_or(|limit| len_bytes <= limit)
    }

    fn read(tree: &Tree) -> Self {
        let limits = tree.text("proc/self/limits").unwrap_or_default();
        let soft = field(&limits, "Max locked memory").and_then(|rest| rest.split_whitespace().next());
        Self {
            limit_bytes: soft.and_then(|limit| limit.parse().ok()),
            may_exceed: Privileges::read(tree).ipc_lock,
        }
    }
}

/// How much memory this process may lock.
#[must_use]
pub fn memlock() -> Memlock {
    Memlock::read(&Tree::machine())
}

/// How much memory a new guest could have: the kernel's available memory, or less if a control group (version
/// 1 or 2) of this process or above it leaves less. File cache that the group can drop counts as free. None
/// if the kernel does not report it.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    read_available(&Tree::machine())
}

/// How much memory this process uses: private and shared, without pages of files on disk and huge pages. 0 if
/// the kernel does not report it.
#[must_use]
pub fn resident_memory_bytes() -> u64 {
    read_resident(&Tree::machine())
}

pub(super) fn read_resident(tree: &Tree) -> u64 {
    let status = tree.text("proc/self/status").unwrap_or_default();
    ["RssAnon", "RssShmem"].iter().filter_map(|key| kibibytes(&status, key)).sum()
}

fn read_available(tree: &Tree) -> Option<u64> {
    let meminfo = tree.text("proc/meminfo")?;
    let available = kibibytes(&meminfo, "MemAvailable")?;
    Some(control_group_room(tree).map_or(available, |room| available.min(room)))
}

impl MemoryReadings {
    pub(super) fn read(tree: &Tree) -> Self {
        let meminfo = tree.text("proc/meminfo").unwrap_or_default();
        Self {
            available_bytes: read_available(tree),
            memlock: Memlock::read(tree),
            free_huge_pages: field(&meminfo, "HugePages_Free")
                .and_then(|count| count.parse().ok())
                .unwrap_or(0),
            huge_page_bytes: kibibytes(&meminfo, "Hugepagesize").unwrap_or(0),
            max_mappings: tree.number("proc/sys/vm/max_map_count"),
        }
    }
}

fn kibibytes(meminfo: &str, key: &str) -> Option<u64> {
    field(meminfo, key)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The least space left by a memory control group: this process's own group and all above it.
fn control_group_room(tree: &Tree) -> Option<u64> {
    let groups = tree.text("proc/self/cgroup")?;
    let mounts = tree.text("proc/self/mountinfo")?;
    // Lines are `hierarchy:controllers:path`; version 2 is hierarchy 0 without controllers.
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        if hierarchy == "0" && controllers.is_empty() {
            room_upwards(tree, &find_mount(&mounts, "cgroup2", None)?, path, &VERSION_2)
        } else if controllers.split(',').any(|name| name == "memory") {
            room_upwards(tree, &find_mount(&mounts, "cgroup", Some("memory"))?, path, &VERSION_1)
        } else {
            None
        }
    };
    groups.lines().filter_map(of_line).min()
}

/// The files of a control group.
struct GroupFiles {
    /// Above the last limit, the kernel slows processes down and reclaims their memory.
    limits: &'static [&'static str],
    usage: &'static str,
    droppable: &'static str,
}

const VERSION_1: GroupFiles = GroupFiles {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    droppable: "total_inactive_file",
};
const VERSION_2: GroupFiles = GroupFiles {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    droppable: "inactive_file",
};

struct Mount {
    /// The mounted group: `/`, except in containers without a group namespace.
    root: String,
    point: PathBuf,
}

/// See proc(5) on mountinfo: `id parent major:minor root point options fields… - type source super-options`.
fn find_mount(mounts: &str, kind: &str, controller: Option<&str>) -> Option<Mount> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (found_kind, options) = (after.next()?, after.nth(1)?);
        if found_kind != kind
            || controller.is_some_and(|name| !options.split(',').any(|option| option == name))
        {
            return None;
        }
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        Some(Mount { root: root.to_owned(), point: PathBuf::from(point.trim_start_matches('/')) })
    })
}

fn room_upwards(tree: &Tree, mount: &Mount, path: &str, files: &GroupFiles) -> Option<u64> {
    let below = Path::new(path).strip_prefix(&mount.root).unwrap_or(Path::new(""));
    below.ancestors().filter_map(|group| room_of(tree, &mount.point.join(group), files)).min()
}

fn room_of(tree: &Tree, group: &Path, files: &GroupFiles) -> Option<u64> {
    // "max" is not a number and so no limit.
    let limit = files.limits.iter().filter_map(|limit| tree.number(group.join(limit))).min()?;
    let usage = tree.number(group.join(files.usage))?;
    let statistics = tree.text(group.join("memory.stat")).unwrap_or_default();
    let droppable = field(&statistics, files.droppable).and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(droppable)))
}

pub(super) fn judge(readings: &Readings) -> Vec<Check> {
    vec![
        judge_available(readings.memory.available_bytes),
        judge_memlock(readings),
        judge_huge_pages(readings),
        judge_mappings(readings),
    ]
}

fn judge_available(available_bytes: Option<u64>) -> Check {
    const ID: &str = "memory.available";
    match available_bytes {
        Some(bytes) if bytes >= SCARCE_BYTES => Check::new(ID, Outcome::Pass, format!("{} available for guests", size(bytes))),
        Some(bytes) => Check::new(ID, Outcome::Warn, format!("only {} available for guests", size(bytes))).mend(
            "stop what uses it (`ps -eo rss,pid,comm --sort=-rss | head`), or raise the limit of the control group or container"
                .to_owned(),
        ),
        None => Check::new(ID, Outcome::Info, "the kernel does not say how much memory is available"),
    }
}

fn judge_memlock(readings: &Readings) -> Check {
    const ID: &str = "memory.locked";
    let Memlock { limit_bytes, may_exceed } = readings.memory.memlock;
    let Some(limit) = limit_bytes else {
        return Check::new(
            ID,
            Outcome::Pass,
            "no limit on locked memory, which RDMA needs for all guest RAM",
        );
    };
    if may_exceed {
        let found =
            format!("the limit on locked memory ({}) does not bind this process (CAP_IPC_LOCK)", size(limit));
        return Check::new(ID, Outcome::Pass, found);
    }
    // Without a device to register memory with, a low limit does no harm yet.
    let outcome =
        if readings.rdma.devices.is_empty() || limit >= GIB { Outcome::Info } else { Outcome::Warn };
    let found = format!("at most {} may be locked: RDMA moves no guest with more RAM", size(limit));
    let remedy = if readings.platform.container {
        "start the container with --ulimit memlock=-1".to_owned()
    } else {
        readings.platform.as_root("prlimit --pid $$ --memlock=unlimited:unlimited")
            + " (this shell; LimitMEMLOCK=infinity in a systemd unit)"
    };
    Check::new(ID, outcome, found).mend(remedy)
}

fn judge_huge_pages(readings: &Readings) -> Check {
    const ID: &str = "memory.huge_pages";
    let MemoryReadings { free_huge_pages, huge_page_bytes, .. } = readings.memory;
    if huge_page_bytes == 0 {
        return Check::new(ID, Outcome::Info, "this kernel has no huge pages; guests use 4 KiB pages");
    }
    if free_huge_pages == 0 {
        return Check::new(
            ID,
            Outcome::Info,
            "no free huge pages; guests use 4 KiB pages unless --hugepages asks for others",
        )
        .mend(
            readings.platform.as_root(&format!("sysctl vm.nr_hugepages={}", (GIB / huge_page_bytes).max(1))),
        );
    }
    let found = format!(
        "{free_huge_pages} free huge pages of {}: {}",
        size(huge_page_bytes),
        size(free_huge_pages.saturating_mul(huge_page_bytes))
    );
    Check::new(ID, Outcome::Pass, found)
}

fn judge_mappings(readings: &Readings) -> Check {
    const ID: &str = "memory.mappings";
    match readings.memory.max_mappings {
        Some(count) if count < DEFAULT_MAPPINGS => Check::new(
            ID,
            Outcome::Warn,
            format!("vm.max_map_count is {count}, below the kernel's default: mapping guest RAM and its devices may fail"),
        )
        .mend(readings.platform.as_root(&format!("sysctl vm.max_map_count={DEFAULT_MAPPINGS}"))),
        Some(count) => Check::new(ID, Outcome::Pass, format!("{count} mappings for each process")),
        None => Check::new(ID, Outcome::Info, "vm.max_map_count cannot be read"),
    }
}

/// Bytes in readable form: `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    let (unit_bytes, unit) = match bytes {
        GIB.. => (GIB, "GiB"),
        MIB.. => (MIB, "MiB"),
        _ => (1024, "KiB"),
    };
    let tenths = bytes / (unit_bytes / 10).max(1);
    if tenths.is_multiple_of(10) || tenths >= 1000 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

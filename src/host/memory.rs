//! How much memory this process may use and lock.

use std::path::{Path, PathBuf};

use super::privileges::Privileges;
use super::tree::{Tree, field};

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

    /// As the kernel reports it.
    #[must_use]
    pub fn read(tree: &Tree) -> Self {
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

/// The same, of a tree.
#[must_use]
pub fn read_resident(tree: &Tree) -> u64 {
    let status = tree.text("proc/self/status").unwrap_or_default();
    ["RssAnon", "RssShmem"].iter().filter_map(|key| kibibytes(&status, key)).sum()
}

/// The same, of a tree.
#[must_use]
pub fn read_available(tree: &Tree) -> Option<u64> {
    let meminfo = tree.text("proc/meminfo")?;
    let available = kibibytes(&meminfo, "MemAvailable")?;
    Some(control_group_room(tree).map_or(available, |room| available.min(room)))
}

/// The bytes of a line such as `MemTotal:  24 kB`.
#[must_use]
pub fn kibibytes(meminfo: &str, key: &str) -> Option<u64> {
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

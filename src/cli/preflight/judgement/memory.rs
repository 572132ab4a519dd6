//! Checks of memory and its limits.

use sterna::host::Memlock;

use crate::cli::preflight::check::{Check, Outcome};
use crate::cli::preflight::readings::{MemoryReadings, Readings};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Below this even a small guest does not fit.
const SCARCE_BYTES: u64 = 512 * MIB;
/// The kernel's default of `vm.max_map_count`.
const DEFAULT_MAPPINGS: u64 = 65_530;

pub(crate) fn judge(readings: &Readings) -> Vec<Check> {
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
fn size(bytes: u64) -> String {
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

//! The layout of guest RAM.
//!
//! ```text
//!   0x00_1000  GDT                     0x10_0000  page tables: one PML4, one PDPT, a directory for each GiB
//!   0x00_2000  IDT                     then       the working set and unused RAM, up to 3 GiB
//!   0x00_8000  payload                 3..4 GiB   nothing (devices)
//!   0x01_0000  control pages, 64       4 GiB      the rest of RAM: unused, then the working set
//!   0x05_0000  stacks, 64
//!   0x09_0000  journal, 32 pages
//! ```
//!
//! The working set is two runs of pages. One begins right behind the page tables, the other ends at the end
//! of RAM, so that it always includes the edges of RAM. The size of each run is in proportion to the RAM on
//! its side of the hole.

use crate::config::{MachineConfig, Workload};
use crate::ram::PAGE_BYTES;

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const PAYLOAD: u64 = 0x8000;
pub(crate) const PAYLOAD_BYTES_MAX: u64 = 0x8000;
pub(crate) const CONTROL: u64 = 0x1_0000;
pub(crate) const STACKS: u64 = 0x5_0000;
pub(crate) const JOURNAL: u64 = 0x9_0000;
pub(crate) const PAGE_TABLES: u64 = 0x10_0000;

pub(crate) const VCPUS_MAX: u8 = 64;
pub(crate) const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// One PML4 entry maps 512 GiB, and the hole takes one GiB.
pub(crate) const MEMORY_BYTES_MAX: u64 = 511 * GIB;

pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const HOLE_START: u64 = 3 * GIB;
pub(crate) const HOLE_END: u64 = 4 * GIB;

/// The control page of a vCPU.
pub(crate) fn control_page(vcpu: u8) -> u64 {
    CONTROL + u64::from(vcpu) * PAGE_BYTES
}

/// The address just above the stack of a vCPU.
pub(crate) fn stack_top(vcpu: u8) -> u64 {
    STACKS + (u64::from(vcpu) + 1) * PAGE_BYTES
}

/// The parts that RAM of this size has: guest address and length in bytes, ascending.
pub(crate) fn ram_parts(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(HOLE_START);
    let high = memory_bytes - low;
    let mut parts = vec![(0, low)];
    if high > 0 {
        parts.push((HOLE_END, high));
    }
    parts
}

/// The first address behind RAM.
pub(crate) fn ram_end(memory_bytes: u64) -> u64 {
    if memory_bytes > HOLE_START { memory_bytes - HOLE_START + HOLE_END } else { memory_bytes }
}

/// The first address behind the page tables, where the working set may begin.
fn working_set_start(memory_bytes: u64) -> u64 {
    PAGE_TABLES + (2 + ram_end(memory_bytes).div_ceil(GIB)) * PAGE_BYTES
}

impl Workload {
    /// The largest working set for a machine with this much RAM: all but the first MiB and the page tables.
    #[must_use]
    pub fn largest_bytes(memory_bytes: u64) -> u64 {
        memory_bytes.saturating_sub(working_set_start(memory_bytes)) / PAGE_BYTES * PAGE_BYTES
    }
}

/// Pages that follow one another in guest RAM, by page number (guest address / 4096).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageRun {
    pub(crate) first: u64,
    pub(crate) pages: u64,
}

impl PageRun {
    pub(crate) fn address(self) -> u64 {
        self.first * PAGE_BYTES
    }

    /// Pages `from..to`, counted from the beginning of the run and cut off at its end.
    fn cut(self, from: u64, to: u64) -> Self {
        let (from, to) = (from.min(self.pages), to.min(self.pages));
        Self { first: self.first + from, pages: to - from }
    }
}

/// The pages that the guest sweeps over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkingSet {
    runs: [PageRun; 2],
    /// The vCPUs that sweep, and all others after them.
    sweepers: u8,
    others: u8,
}

impl WorkingSet {
    /// Where the working set of this machine lies. The configuration must have been checked.
    pub(crate) fn of(config: &MachineConfig) -> Self {
        let pages = config.workload.working_set_bytes / PAGE_BYTES;
        let start = working_set_start(config.memory_bytes) / PAGE_BYTES;
        let end = ram_end(config.memory_bytes) / PAGE_BYTES;
        let above_hole = config.memory_bytes.saturating_sub(HOLE_START) / PAGE_BYTES;
        let lower = if above_hole == 0 {
            pages.div_ceil(2)
        } else {
            let below_hole = HOLE_START / PAGE_BYTES - start;
            let share = u128::from(pages) * u128::from(below_hole) / u128::from(below_hole + above_hole);
            // Rounding down must not ask more of the part above the hole than it has.
            u64::try_from(share).unwrap_or(below_hole).max(pages.saturating_sub(above_hole))
        };
        let upper = pages - lower;
        let sweepers = match config.workload.sweepers {
            0 => config.vcpus,
            sweepers => sweepers.min(config.vcpus),
        };
        Self {
            runs: [PageRun { first: start, pages: lower }, PageRun { first: end - upper, pages: upper }],
            sweepers,
            others: config.vcpus - sweepers,
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.runs[0].pages + self.runs[1].pages
    }

    /// The pages of one vCPU, in the order in which it writes them. The second run has pages only if the
    /// first has.
    pub(crate) fn share(&self, vcpu: u8) -> [PageRun; 2] {
        let part = |index: u64| {
            let swept = self.pages().saturating_sub(self.others.into());
            let share = u128::from(swept) * u128::from(index.min(self.sweepers.into()));
            let share = u64::try_from(share / u128::from(self.sweepers)).unwrap_or(u64::MAX);
            share + index.saturating_sub(self.sweepers.into())
        };
        let (from, to) = (part(u64::from(vcpu)), part(u64::from(vcpu) + 1));
        let lower = self.runs[0].pages;
        let first = self.runs[0].cut(from, to);
        let second = self.runs[1].cut(from.saturating_sub(lower), to.saturating_sub(lower));
        if first.pages == 0 { [second, PageRun::default()] } else { [first, second] }
    }
}

/// Pages in a share.
pub(crate) fn pages_of(share: &[PageRun; 2]) -> u64 {
    share[0].pages.saturating_add(share[1].pages)
}

/// The page numbers of a share, in the order in which they are written.
pub(crate) fn page_numbers(share: &[PageRun; 2]) -> impl Iterator<Item = u64> + use<> {
    let [first, second] = *share;
    let numbers = |run: PageRun| run.first..run.first.saturating_add(run.pages);
    numbers(first).chain(numbers(second))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Workload;
    use std::collections::BTreeSet;

    fn config(memory_bytes: u64, vcpus: u8, working_set_bytes: u64) -> MachineConfig {
        let workload = Workload { working_set_bytes, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
        MachineConfig { memory_bytes, vcpus, hugepages: None, workload }
    }

    #[test]
    fn vcpus_that_do_not_sweep_have_one_page_each() {
        for (sweepers, expected) in [(1, [253, 1, 1, 1]), (3, [85, 85, 85, 1]), (4, [64; 4]), (9, [64; 4])] {
            let mut config = config(16 << 20, 4, 1 << 20);
            config.workload.sweepers = sweepers;
            let set = WorkingSet::of(&config);
            assert_eq!([0, 1, 2, 3].map(|vcpu| pages_of(&set.share(vcpu))), expected, "{sweepers}");
        }
    }

    /// For every size, each page is in RAM, above the page tables, and belongs to exactly one vCPU.
    #[test]
    fn every_page_of_the_working_set_is_ram_and_has_one_owner() {
        for memory_bytes in
            [16 << 20, (16 << 20) + 4096, 3 * GIB - 4096, 3 * GIB, 3 * GIB + 4096, 5 * GIB + 8192]
        {
            let largest = Workload::largest_bytes(memory_bytes);
            for bytes in [0, 4096, 5 * 4096, 1 << 20, largest / 2 / 4096 * 4096, largest] {
                // Counting single pages is too slow for machines with millions of them.
                if bytes > 64 << 20 {
                    continue;
                }
                for (vcpus, sweepers) in [(1, 0), (3, 0), (64, 0), (5, 2)] {
                    let mut config = config(memory_bytes, vcpus, bytes);
                    config.workload.sweepers = sweepers;
                    let set = WorkingSet::of(&config);
                    assert_eq!(set.pages() * PAGE_BYTES, bytes);
                    let mut seen = BTreeSet::new();
                    for vcpu in 0..vcpus {
                        let share = set.share(vcpu);
                        assert!(share[0].pages > 0 || share[1].pages == 0);
                        for page in page_numbers(&share) {
                            let address = page * PAGE_BYTES;
                            assert!(address >= working_set_start(memory_bytes));
                            assert!(
                                ram_parts(memory_bytes)
                                    .iter()
                                    .any(|&(at, len)| (at..at + len).contains(&address))
                            );
                            assert!(seen.insert(page), "page {page} twice");
                        }
                    }
                    assert_eq!(seen.len() as u64, set.pages());
                }
            }
        }
    }

    #[test]
    fn the_largest_working_set_fills_ram_to_its_end() {
        for memory_bytes in [16 << 20, 3 * GIB, 3 * GIB + 4096, 7 * GIB, MEMORY_BYTES_MAX] {
            let set = WorkingSet::of(&config(memory_bytes, 1, Workload::largest_bytes(memory_bytes)));
            let [low, high] = set.runs;
            assert_eq!(high.address() + high.pages * PAGE_BYTES, ram_end(memory_bytes));
            assert!(low.address() + low.pages * PAGE_BYTES <= high.address());
            if memory_bytes > HOLE_START {
                assert_eq!(low.address() + low.pages * PAGE_BYTES, HOLE_START);
                assert_eq!(high.address(), HOLE_END);
            }
        }
    }
}

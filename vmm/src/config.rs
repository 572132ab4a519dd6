//! What a machine is made from: its kind, its RAM and vCPUs, and its guest's work.

use serde::{Deserialize, Serialize};

use crate::ram::PAGE_BYTES;

/// The parts of a machine. State moves only between machines of equal configurations; `hugepages` alone may
/// differ between hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// RAM in bytes: a multiple of 4 KiB, from 16 MiB to 511 GiB. RAM beyond 3 GiB lies above 4 GiB.
    pub memory_bytes: u64,
    /// Virtual processors, 1 to 64.
    pub vcpus: u8,
    /// Back the RAM with huge pages of this size; `memory_bytes` must then be a multiple of it.
    pub hugepages: Option<HugePageSize>,
    /// What the built-in guest does.
    pub workload: Workload,
}

/// The page sizes of hugetlbfs on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePageSize {
    /// 2 MiB.
    TwoMiB,
    /// 1 GiB.
    OneGiB,
}

impl HugePageSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::TwoMiB => 2 << 20,
            Self::OneGiB => 1 << 30,
        }
    }
}

/// The built-in guest's work: it sweeps over its working set, again and again, at a steady rate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// How much memory the guest writes in one pass, in bytes; rounded down to whole pages. At most
    /// [`Workload::largest_bytes`].
    pub working_set_bytes: u64,
    /// The guest's write rate in 10^6 bytes a second, counted as whole pages, all vCPUs together. At 0 the
    /// guest writes each page once and is then idle, but still beats.
    pub rate_mb_per_s: u64,
    /// Whether the VMM writes the first generation of the pattern before the guest starts, so that the guest
    /// begins with the second. This fills a large working set at once, even where a guest runs slowly. With
    /// rate 0 it leaves the guest nothing to write.
    pub prefill: bool,
    /// How many vCPUs share the working set; 0 is all. Each of the others has one page of it, which it writes
    /// again and again: it works as much and leaves hardly any page dirty.
    pub sweepers: u8,
}

impl Workload {
    /// A quiet guest with half of the RAM as its working set, prefilled.
    #[must_use]
    pub fn for_memory(memory_bytes: u64) -> Self {
        let half = memory_bytes / 2 / PAGE_BYTES * PAGE_BYTES;
        Self {
            working_set_bytes: half.min(Self::largest_bytes(memory_bytes)),
            rate_mb_per_s: 0,
            prefill: true,
            sweepers: 0,
        }
    }

    /// The same working set, written at another rate.
    #[must_use]
    pub fn at_rate(self, rate_mb_per_s: u64) -> Self {
        Self { rate_mb_per_s, ..self }
    }
}

/// The two kinds of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineKind {
    /// A real guest on /dev/kvm.
    Kvm,
    /// Threads that behave as the guest would, for hosts without /dev/kvm.
    Synthetic,
}

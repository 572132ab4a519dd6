//! What a machine is to its caller: the trait, and what goes into and comes out of it.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sterna_bitmap::SoftwareBitmap;
use vm_memory::GuestMemoryMmap;

use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::kvm::DirtyRings;

/// The guest RAM of every machine here: a region on each side of the hole below 4 GiB, shared mappings of one memfd.
///
/// The bitmap tells what the VMM itself wrote since the bitmap was last read; what the vCPUs of a KVM machine
/// write is in KVM's own log and comes here only where dirty rings are [collected](DirtyRings::collect).
pub type GuestRam = GuestMemoryMmap<SoftwareBitmap>;

/// The size of the pages in which memory is counted everywhere in this crate, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// What a machine is made of. Two machines between which state moves must be made from equal configurations,
/// save for `hugepages`, which is each host's own affair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// RAM in bytes: a multiple of 4 KiB, from 16 MiB to 511 GiB. What does not fit below 3 GiB lies above 4 GiB.
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

/// What the built-in guest does: it sweeps over its working set, again and again, at a steady rate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// How much memory the guest writes in one pass, in bytes; rounded down to whole pages. At most
    /// [`Workload::largest_bytes`].
    pub working_set_bytes: u64,
    /// How fast it writes, in 10^6 bytes a second counted as whole pages, all vCPUs together. 0: each page is
    /// touched once, then the guest is idle (it still beats).
    pub rate_mb_per_s: u64,
    /// The VMM writes the first generation of the pattern before the guest starts, and the guest begins with the
    /// second. Then a large working set is there at once, also where a guest runs slowly. With rate 0 it leaves
    /// the guest nothing to write.
    pub prefill: bool,
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

/// How a caller learns which pages changed. The software bitmap of [`Machine::memory`] counts in both cases.
#[derive(Clone, Debug)]
pub enum DirtyTracking<'machine> {
    /// KVM's dirty log, for what the vCPUs write, and the software bitmap, for what the VMM writes. The slots are
    /// set without flags; whoever wants the log sets `KVM_MEM_LOG_DIRTY_PAGES` on them.
    Kvm {
        /// The VM file descriptor.
        vm: BorrowedFd<'machine>,
        /// The slots of RAM, by ascending guest address: each region of [`Machine::memory`] in parts of 64 GiB.
        slots: Vec<MemorySlot>,
    },
    /// KVM's dirty rings, for what the vCPUs write. Collecting them adds that to the software bitmap.
    Rings(Arc<DirtyRings>),
    /// The software bitmap alone.
    SoftwareOnly,
}

/// One slot of RAM as KVM knows it (`struct kvm_userspace_memory_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number for the slot.
    pub slot: u32,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Its length in bytes, a multiple of 4 KiB.
    pub len_bytes: u64,
    /// Where this process has it mapped.
    pub host_address: u64,
}

/// Where a machine is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, its RAM untouched: [`Machine::start`] or [`Machine::load`] comes next.
    Fresh,
    /// The guest runs.
    Running,
    /// Every vCPU is quiet and the memory stands still.
    Paused,
    /// The guest cannot go on; the text says why. Its memory can still be read.
    Failed(String),
    /// [`Machine::stop`] was called.
    Stopped,
}

/// The guest's sign of life, as the VMM saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// How often the guest has beaten, counted by the guest. It goes on from host to host.
    pub count: u64,
    /// When this machine saw the latest beat, in nanoseconds of this host's `CLOCK_MONOTONIC`; 0 before the first.
    pub at_ns: u64,
    /// When this machine saw its own first beat; 0 before it. After [`Machine::load`] that is the end of the
    /// guest's downtime, as `at_ns` on the source is its beginning.
    pub first_at_ns: u64,
    /// The longest time between two beats that this machine saw, in nanoseconds.
    pub longest_gap_ns: u64,
    /// How often the count was not the last one plus one: a guest that lost memory or ran twice.
    pub regressions: u64,
}

/// How a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// Whole passes over the working set that every vCPU has finished, a prefilled one included.
    pub passes: u64,
    /// What [`Machine::throttle`] last set.
    pub throttle_percent: u8,
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuStatus>,
}

/// How one vCPU is doing. A vCPU that hangs shows by a heartbeat that does not advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStatus {
    /// Its own heartbeat; vCPU 0's is [`Machine::heartbeat`].
    pub heartbeat: Heartbeat,
    /// Pages it has written, prefilled ones included.
    pub pages_written: u64,
    /// Pages of the working set that are its own.
    pub pages: u64,
    /// Interrupts that it took from its local APIC timer (0 on a synthetic machine).
    pub timer_interrupts: u64,
    /// Interrupts that it took from the PIT by way of the PIC: vCPU 0 only (0 on a synthetic machine).
    pub pit_interrupts: u64,
}

/// What a look at the whole working set and at the journal that the VMM keeps in guest RAM found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCheck {
    /// Pages looked at.
    pub pages: u64,
    /// Pages that do not hold what they must hold.
    pub wrong: u64,
    /// The guest address of a wrong page, for a human to begin with.
    pub first_wrong: Option<u64>,
}

/// A machine with a guest in it.
///
/// All methods may be called from any thread. None of them panics because of the guest.
///
/// ```text
///            start              pause
///   Fresh ───────────▶ Running ◀──────▶ Paused        any ── stop ──▶ Stopped
///     │                         resume    ▲           Running ──(the guest breaks)──▶ Failed
///     └────────────── load ───────────────┘
/// ```
pub trait Machine: Send + Sync + Debug {
    /// Whether this is a real guest.
    fn kind(&self) -> MachineKind;

    /// What it was made from.
    fn config(&self) -> &MachineConfig;

    /// The processor that the guest sees, and what a host must offer to take the guest over.
    fn cpu(&self) -> &CpuDescription;

    /// The guest's RAM. Cloning it is cheap and keeps the mapping alive after the machine is gone.
    fn memory(&self) -> &GuestRam;

    /// How to learn which pages changed.
    fn dirty_tracking(&self) -> DirtyTracking<'_>;

    /// Writes guest and working set into RAM and runs a fresh machine.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] on a machine that is not fresh; [`MachineError::Kvm`] and
    /// [`MachineError::Thread`] when the host refuses.
    fn start(&self) -> Result<(), MachineError>;

    /// Stops every vCPU and returns when all are out of the guest. A paused machine stays paused.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] before the first run or after `stop`; [`MachineError::GuestFailed`].
    fn pause(&self) -> Result<(), MachineError>;

    /// Lets every vCPU go on. A running machine goes on running.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause), and [`MachineError::Thread`] at the first run after `load`.
    fn resume(&self) -> Result<(), MachineError>;

    /// Makes every vCPU sleep this share of the time, 0 to 99; 0 ends it at once. A guest that sleeps much of its own
    /// accord is slowed less than that: it works in the time that is left.
    ///
    /// # Errors
    /// [`MachineError::Config`] for 100 and more; [`MachineError::Thread`].
    fn throttle(&self, percent: u8) -> Result<(), MachineError>;

    /// The state of vCPUs and devices of a paused machine, without its RAM.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless paused; [`MachineError::Kvm`].
    fn save(&self) -> Result<Vec<u8>, MachineError>;

    /// Takes over a saved state into a fresh machine whose RAM already holds the guest's memory, and leaves it
    /// paused. Everything that can be checked is checked before anything is changed. After an error the machine is
    /// still fresh and may be loaded again.
    ///
    /// # Errors
    /// [`MachineError::State`] for bytes that are no state, [`MachineError::StateMismatch`] for another machine's,
    /// [`MachineError::Msr`] and [`MachineError::Kvm`] when this host cannot take it over.
    fn load(&self, state: &[u8]) -> Result<(), MachineError>;

    /// The heartbeat of vCPU 0.
    fn heartbeat(&self) -> Heartbeat;

    /// How the machine is doing.
    fn status(&self) -> MachineStatus;

    /// What the guest wrote to its serial console, as far back as the VMM keeps it (the last 64 KiB).
    fn console(&self) -> Vec<u8>;

    /// Asks the running guest to check its own memory: the words of the latest generation in every page of the
    /// working set, and the journal. Each vCPU stops sweeping for its check and sweeps on afterwards; it beats all
    /// the while.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless running; [`MachineError::Timeout`]; [`MachineError::GuestFailed`].
    fn check_from_inside(&self, timeout: Duration) -> Result<GuestCheck, MachineError>;

    /// Reads every word of the working set and of the journal of a paused machine, and judges it by the pattern.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless the machine is paused.
    fn check_from_outside(&self) -> Result<GuestCheck, MachineError>;

    /// Ends the guest: its vCPU threads are gone on return. RAM stays until the machine is dropped.
    fn stop(&self);
}

/// A machine shared between threads.
pub type SharedMachine = Arc<dyn Machine>;

//! The interface of a machine: the trait, its configuration, and what it reports.

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

/// The guest RAM of every machine: a region on each side of the hole below 4 GiB, shared mappings of one
/// memfd.
///
/// The bitmap lists the pages that the VMM itself wrote since the last read of the bitmap. Pages that the
/// vCPUs of a KVM machine wrote are in KVM's own log, and enter the bitmap only when dirty rings are
/// [collected](DirtyRings::collect).
pub type GuestRam = GuestMemoryMmap<SoftwareBitmap>;

/// The page size of this crate, in bytes.
pub const PAGE_BYTES: u64 = 4096;

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

/// How a caller learns which pages changed. The software bitmap of [`Machine::memory`] counts in every case.
#[derive(Clone, Debug)]
pub enum DirtyTracking<'machine> {
    /// KVM's dirty log for the vCPUs' writes, and the software bitmap for the VMM's. The slots are set
    /// without flags; a caller that wants the log sets `KVM_MEM_LOG_DIRTY_PAGES` on them.
    Kvm {
        /// The VM file descriptor.
        vm: BorrowedFd<'machine>,
        /// The slots of RAM, by ascending guest address: each region of [`Machine::memory`] in parts of 64
        /// GiB.
        slots: Vec<MemorySlot>,
    },
    /// KVM's dirty rings for the vCPUs' writes. Collecting them marks these pages in the software bitmap.
    Rings(Arc<DirtyRings>),
    /// The software bitmap alone.
    SoftwareOnly,
}

/// One slot of RAM as KVM has it (`struct kvm_userspace_memory_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number for the slot.
    pub slot: u32,
    /// Its guest address.
    pub guest_address: u64,
    /// Its length in bytes, a multiple of 4 KiB.
    pub len_bytes: u64,
    /// Its address in this process.
    pub host_address: u64,
}

/// A machine's phase of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Created, its RAM untouched: [`Machine::start`] or [`Machine::load`] comes next.
    Fresh,
    /// The guest runs.
    Running,
    /// Every vCPU is quiet and the memory does not change.
    Paused,
    /// The guest cannot continue; the text says why. Its memory can still be read.
    Failed(String),
    /// [`Machine::stop`] was called.
    Stopped,
}

/// The guest's sign of life, as the VMM saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// The number of beats, counted by the guest. It continues from host to host.
    pub count: u64,
    /// When this machine received the latest beat, in nanoseconds of this host's `CLOCK_MONOTONIC`; 0 before
    /// the first.
    pub at_ns: u64,
    /// When this machine received its own first beat; 0 before it. After [`Machine::load`] that is the end of
    /// the guest's downtime, as `at_ns` on the source is its beginning.
    pub first_at_ns: u64,
    /// The longest time between two beats on this machine, in nanoseconds.
    pub longest_gap_ns: u64,
    /// How often a count was not the previous count plus one: the guest lost memory or ran twice.
    pub regressions: u64,
}

/// A machine's condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineStatus {
    /// Its phase of life.
    pub phase: Phase,
    /// Whole passes over the working set that every vCPU has finished, a prefilled one included.
    pub passes: u64,
    /// What [`Machine::throttle`] last set.
    pub throttle_percent: u8,
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuStatus>,
}

/// A vCPU's condition. The heartbeat of a vCPU that hangs does not advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStatus {
    /// Its own heartbeat; vCPU 0's is [`Machine::heartbeat`].
    pub heartbeat: Heartbeat,
    /// Pages that it has written, prefilled ones included.
    pub pages_written: u64,
    /// Its own pages of the working set.
    pub pages: u64,
    /// Interrupts taken from its local APIC timer (0 on a synthetic machine).
    pub timer_interrupts: u64,
    /// Interrupts taken from the PIT through the PIC: vCPU 0 only (0 on a synthetic machine).
    pub pit_interrupts: u64,
}

/// The findings of a check of the whole working set and of the journal that the VMM keeps in guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCheck {
    /// Pages checked.
    pub pages: u64,
    /// Pages with a wrong content.
    pub wrong: u64,
    /// The guest address of a wrong page, as a start for debugging.
    pub first_wrong: Option<u64>,
}

/// A machine with a guest in it.
///
/// Any thread may call any method. No method panics because of the guest.
///
/// ```text
///            start              pause
///   Fresh ───────────▶ Running ◀──────▶ Paused        any ── stop ──▶ Stopped
///     │                         resume    ▲           Running ──(the guest breaks)──▶ Failed
///     └────────────── load ───────────────┘
/// ```
pub trait Machine: Send + Sync + Debug {
    /// Whether the machine runs a real guest.
    fn kind(&self) -> MachineKind;

    /// The configuration that it was made from.
    fn config(&self) -> &MachineConfig;

    /// The processor that the guest sees, which a host must offer to take the guest over.
    fn cpu(&self) -> &CpuDescription;

    /// The guest's RAM. A clone is cheap and keeps the mapping alive after the machine is dropped.
    fn memory(&self) -> &GuestRam;

    /// How the caller learns which pages changed.
    fn dirty_tracking(&self) -> DirtyTracking<'_>;

    /// Writes guest and working set into RAM and runs a fresh machine.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] on a machine that is not fresh; [`MachineError::Kvm`] and
    /// [`MachineError::Thread`] when the host refuses.
    fn start(&self) -> Result<(), MachineError>;

    /// Stops every vCPU and returns when all have left the guest. A paused machine stays paused.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] before the first run or after `stop`; [`MachineError::GuestFailed`].
    fn pause(&self) -> Result<(), MachineError>;

    /// Lets every vCPU continue. A running machine stays running.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause), and [`MachineError::Thread`] at the first run after `load`.
    fn resume(&self) -> Result<(), MachineError>;

    /// Makes every vCPU sleep this share of the time, 0 to 99; 0 ends the throttle at once. It slows a guest
    /// that already sleeps much by less than that, because the guest works in the remaining time.
    ///
    /// # Errors
    /// [`MachineError::Config`] for 100 and more; [`MachineError::Thread`].
    fn throttle(&self, percent: u8) -> Result<(), MachineError>;

    /// The state of vCPUs and devices of a paused machine, without its RAM.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless paused; [`MachineError::Kvm`].
    fn save(&self) -> Result<Vec<u8>, MachineError>;

    /// Loads a saved state into a fresh machine with the guest's memory already in its RAM, and leaves the
    /// machine paused. All possible checks precede the first change. After an error the machine is still
    /// fresh and may be loaded again.
    ///
    /// # Errors
    /// [`MachineError::State`] for bytes that are no state, [`MachineError::StateMismatch`] for another
    /// machine's, [`MachineError::Msr`] and [`MachineError::Kvm`] when this host cannot take it over.
    fn load(&self, state: &[u8]) -> Result<(), MachineError>;

    /// The heartbeat of vCPU 0.
    fn heartbeat(&self) -> Heartbeat;

    /// The machine's condition.
    fn status(&self) -> MachineStatus;

    /// The guest's output to its serial console, as far back as the VMM keeps it (the last 64 KiB).
    fn console(&self) -> Vec<u8>;

    /// Asks the running guest to check its own memory: the words of the latest generation in every page of
    /// the working set, and the journal. Each vCPU interrupts its sweep for the check, and beats all the
    /// while.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless running; [`MachineError::Timeout`]; [`MachineError::GuestFailed`].
    fn check_from_inside(&self, timeout: Duration) -> Result<GuestCheck, MachineError>;

    /// Reads every word of the working set and of the journal of a paused machine, and compares it with the
    /// pattern.
    ///
    /// # Errors
    /// [`MachineError::WrongPhase`] unless the machine is paused.
    fn check_from_outside(&self) -> Result<GuestCheck, MachineError>;

    /// Ends the guest: its vCPU threads have ended on return. RAM stays until the machine is dropped.
    fn stop(&self);
}

/// A machine shared between threads.
pub type SharedMachine = Arc<dyn Machine>;

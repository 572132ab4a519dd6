//! What a machine reports of itself and of its guest.

use std::num::NonZeroU64;

/// A machine's phase of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Created, its RAM untouched: [`start`](crate::Machine::start) or [`load`](crate::Machine::load)
    /// comes next.
    Fresh,
    /// The guest runs.
    Running,
    /// Every vCPU is quiet and the memory does not change.
    Paused,
    /// The guest cannot continue; the text says why. Its memory can still be read.
    Failed(String),
    /// [`Machine::stop`](crate::Machine::stop) was called.
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
    /// When this machine received its own first beat; 0 before it. After
    /// [`Machine::load`](crate::Machine::load) that is the end of the guest's downtime, as `at_ns` on the
    /// source is its beginning.
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
    /// What [`Machine::throttle`](crate::Machine::throttle) last set.
    pub throttle_percent: u8,
    /// What [`Machine::limit_writes`](crate::Machine::limit_writes) last set.
    pub pages_per_second: Option<NonZeroU64>,
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuStatus>,
}

/// A vCPU's condition. The heartbeat of a vCPU that hangs does not advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStatus {
    /// Its own heartbeat; vCPU 0's is [`Machine::heartbeat`](crate::Machine::heartbeat).
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

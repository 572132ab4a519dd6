//! The interface of a machine: the trait, and how a caller learns which pages changed.

use std::fmt::Debug;
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{MachineConfig, MachineKind};
use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::kvm::DirtyRings;
use crate::ram::{GuestRam, MemorySlot};
use crate::status::{GuestCheck, Heartbeat, MachineStatus};
use crate::write_quota::VcpuWrites;

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

    /// Limits how many pages each vCPU writes anew in a second; `None` ends the limit at once. A vCPU above
    /// its quota stands still until it is within the quota. A page counts again once its mark in the software
    /// bitmap is taken.
    ///
    /// # Errors
    /// [`MachineError::NoWriteQuota`] without dirty rings, which alone tell the vCPUs' writes apart;
    /// [`MachineError::Thread`].
    fn limit_writes(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), MachineError>;

    /// What each vCPU has written, in order; `None` if their writes cannot be told apart.
    fn vcpu_writes(&self) -> Option<Vec<VcpuWrites>>;

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

//! What can go wrong with a machine.

use std::io;
use std::time::Duration;

/// Why a machine could not be made or did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A configuration that no machine can have.
    #[error("this machine cannot be: {0}")]
    Config(String),

    /// There is no /dev/kvm.
    #[error(
        "no /dev/kvm on this host: enable virtualization in the firmware, then `modprobe kvm_intel` or \
         `modprobe kvm_amd`; without KVM a synthetic machine still runs"
    )]
    KvmMissing,

    /// /dev/kvm belongs to others.
    #[error(
        "no permission to open /dev/kvm: add yourself to its group (`sudo usermod -aG kvm $USER`, then log in \
         again) or run as root"
    )]
    KvmPermission,

    /// The kernel's KVM lacks something that the machine is built on.
    #[error("KVM of this kernel is too old: {what} is missing; Linux 4.20 or newer has it")]
    KvmTooOld {
        /// What is missing.
        what: String,
    },

    /// KVM has no dirty rings, or none so long.
    #[error(
        "KVM of this host has dirty rings of {most} entries at most, and {entries} were asked for: ask for fewer, or for \
         the dirty bitmap; Linux 6.1 or newer has rings"
    )]
    NoDirtyRing {
        /// What was asked for.
        entries: u32,
        /// The most that a ring here may have; 0 where there are none.
        most: usize,
    },

    /// KVM refused a call.
    #[error("KVM refused to {doing}: {source}")]
    Kvm {
        /// What was being done.
        doing: String,
        /// What the kernel answered.
        source: io::Error,
    },

    /// A model specific register of the state does not exist here or refuses its value.
    #[error(
        "model specific register {index:#x} of vCPU {vcpu} cannot be set to {value:#x} on this host: its KVM or \
         processor is older than the source's"
    )]
    Msr {
        /// Which vCPU.
        vcpu: u8,
        /// The register.
        index: u32,
        /// Its value in the state.
        value: u64,
    },

    /// RAM could not be had.
    #[error("cannot get {len_bytes} bytes of guest RAM ({doing}): {source}{remedy}")]
    Memory {
        /// How much was asked for.
        len_bytes: u64,
        /// Which step failed.
        doing: &'static str,
        /// What the kernel answered.
        source: io::Error,
        /// What to do about it, empty if nothing is known.
        remedy: &'static str,
    },

    /// Guest RAM was addressed outside of its bounds.
    #[error("guest address {guest_address:#x} cannot be reached: {source}")]
    GuestAddress {
        /// The address.
        guest_address: u64,
        /// What vm-memory says.
        source: vm_memory::GuestMemoryError,
    },

    /// A thread could not be made.
    #[error("cannot start the thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the kernel answered.
        source: io::Error,
    },

    /// The machine is in no phase for this.
    #[error("cannot {doing}: the machine is {phase}, and must be {wanted}")]
    WrongPhase {
        /// What was asked.
        doing: &'static str,
        /// Where the machine is.
        phase: &'static str,
        /// Where it would have to be.
        wanted: &'static str,
    },

    /// The guest broke.
    #[error("the guest has failed: {reason}")]
    GuestFailed {
        /// How.
        reason: String,
    },

    /// The guest did not answer in time.
    #[error("the guest did not finish to {doing} within {timeout:?}: {missing} of its vCPUs are silent")]
    Timeout {
        /// What it was asked to do.
        doing: &'static str,
        /// How long it was given.
        timeout: Duration,
        /// How many vCPUs did not answer.
        missing: usize,
    },

    /// Bytes that are no machine state of this version.
    #[error("this is no machine state that can be loaded: {reason}")]
    State {
        /// What is wrong with it.
        reason: String,
    },

    /// The state of another machine.
    #[error("the state is of another machine: {what} is {in_state} there and {in_machine} here")]
    StateMismatch {
        /// What differs.
        what: &'static str,
        /// In the state.
        in_state: String,
        /// In this machine.
        in_machine: String,
    },
}

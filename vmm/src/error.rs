//! What can go wrong with a machine.

use std::io;
use std::time::Duration;

/// Why a machine could not be made or did not do what the caller asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A configuration that no machine can have.
    #[error("this machine cannot be: {0}")]
    Config(String),

    /// The host has no /dev/kvm.
    #[error(
        "no /dev/kvm on this host: enable virtualization in the firmware, then `modprobe kvm_intel` or \
         `modprobe kvm_amd`; without KVM a synthetic machine still runs"
    )]
    KvmMissing,

    /// This user may not open /dev/kvm.
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

    /// KVM has no dirty rings, or only shorter ones.
    #[error(
        "KVM of this host has dirty rings of {most} entries at most, and {entries} were asked for: ask for fewer, or for \
         the dirty bitmap; Linux 6.1 or newer has rings"
    )]
    NoDirtyRing {
        /// The length asked for.
        entries: u32,
        /// The longest ring on this host; 0 without dirty rings.
        most: usize,
    },

    /// The machine cannot tell its vCPUs' writes apart.
    #[error(
        "the writes of a vCPU cannot be limited without dirty rings; a machine on KVM can be made with them"
    )]
    NoWriteQuota,

    /// KVM refused a call.
    #[error("KVM refused to {doing}: {source}")]
    Kvm {
        /// The action that needed the call.
        doing: String,
        /// The kernel's answer.
        source: io::Error,
    },

    /// This host does not have a model specific register of the state, or refuses its value.
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

    /// The host could not provide RAM.
    #[error("cannot get {len_bytes} bytes of guest RAM ({doing}): {source}{remedy}")]
    Memory {
        /// The size asked for.
        len_bytes: u64,
        /// The step that failed.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// The remedy, empty if unknown.
        remedy: &'static str,
    },

    /// An access to guest RAM was out of bounds.
    #[error("guest address {guest_address:#x} cannot be reached: {source}")]
    GuestAddress {
        /// The address.
        guest_address: u64,
        /// The error of vm-memory.
        source: vm_memory::GuestMemoryError,
    },

    /// A thread could not be started.
    #[error("cannot start the thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },

    /// The machine is in the wrong phase for the call.
    #[error("cannot {doing}: the machine is {phase}, and must be {wanted}")]
    WrongPhase {
        /// The action asked for.
        doing: &'static str,
        /// The machine's phase.
        phase: &'static str,
        /// The phase that the action needs.
        wanted: &'static str,
    },

    /// The guest failed.
    #[error("the guest has failed: {reason}")]
    GuestFailed {
        /// Why.
        reason: String,
    },

    /// The guest did not answer in time.
    #[error("the guest did not finish to {doing} within {timeout:?}: {missing} of its vCPUs are silent")]
    Timeout {
        /// The action asked for.
        doing: &'static str,
        /// The time that it had.
        timeout: Duration,
        /// How many vCPUs did not answer.
        missing: usize,
    },

    /// The bytes are not a machine state of this version.
    #[error("this is no machine state that can be loaded: {reason}")]
    State {
        /// What is wrong with them.
        reason: String,
    },

    /// The state belongs to another machine.
    #[error("the state is of another machine: {what} is {in_state} there and {in_machine} here")]
    StateMismatch {
        /// The property that differs.
        what: &'static str,
        /// Its value in the state.
        in_state: String,
        /// Its value in this machine.
        in_machine: String,
    },
}

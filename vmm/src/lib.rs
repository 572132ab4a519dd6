//! A small KVM machine with a built-in guest that proves its own memory.
//!
//! It demonstrates and tests live migration on any host, because it needs no kernel image and no disk. It
//! knows nothing of migration beyond pausing, resuming, throttling, saving and loading.
//!
//! ```
//! use std::time::Duration;
//! use sterna_vmm::{MachineConfig, Workload, new_synthetic};
//!
//! # fn main() -> Result<(), sterna_vmm::MachineError> {
//! let memory_bytes = 32 << 20;
//! let workload = Workload::for_memory(memory_bytes).at_rate(50);
//! let config = MachineConfig { memory_bytes, vcpus: 2, hugepages: None, workload };
//! let machine = new_synthetic(config)?; // `new_kvm` makes a real one
//! machine.start()?;
//! assert_eq!(machine.check_from_inside(Duration::from_secs(60))?.wrong, 0);
//! machine.pause()?;
//! assert_eq!(machine.check_from_outside()?.wrong, 0);
//! # Ok(())
//! # }
//! ```
//!
//! # The guest
//!
//! The vCPUs share a working set. In each pass they write a pattern into it that encodes the page and the
//! pass, at the rate that the [`Workload`] asks for. Between their turns they sleep until the local APIC's
//! timer wakes them. Each vCPU beats: it increments a count and sends it to the VMM, which stamps the beat
//! with the time. With every beat of vCPU 0 the VMM itself writes into guest RAM, as a device would.
//!
//! So the guest detects its own damage. It stops beating when a timer is lost. It miscounts when it runs
//! twice or from old memory. When asked to check, it finds pages that are lost, old, torn or misplaced,
//! whether KVM's dirty log or the VMM's own bitmap should have listed them.
//!
//! # A machine's life
//!
//! A fresh machine has not touched its RAM. It either [starts](Machine::start) its guest, or
//! [loads](Machine::load) another guest's state after that guest's memory has been copied into its RAM.
//! Dropping a machine ends its guest.
//!
//! # What it does to the process
//!
//! A real machine takes the signal `SIGRTMIN` to bring vCPU threads out of the guest.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("sterna-vmm runs on x86-64 Linux only");

mod clock;
mod config;
mod cpu;
mod error;
mod guest;
mod heartbeat_device;
mod kvm;
mod machine;
mod machine_core;
mod memory;
mod platform;
mod poison;
mod ram;
mod snapshot;
mod status;
mod synthetic;
mod vcpu_threads;
mod write_quota;

pub use clock::monotonic_ns;
pub use config::{HugePageSize, MachineConfig, MachineKind, Workload};
pub use cpu::{CpuDescription, CpuidEntry, MAX_CPUID_ENTRIES, MAX_MSRS};
pub use error::MachineError;
pub use kvm::{DirtyRings, RING_ENTRIES_MAX, RING_ENTRIES_MIN, host_cpu, new_kvm, new_kvm_with_rings};
pub use machine::{DirtyTracking, Machine, SharedMachine};
pub use ram::{GuestRam, MemorySlot, PAGE_BYTES};
pub use snapshot::MAX_STATE_BYTES;
pub use status::{GuestCheck, Heartbeat, MachineStatus, Phase, VcpuStatus};
pub use synthetic::new_synthetic;
pub use write_quota::VcpuWrites;

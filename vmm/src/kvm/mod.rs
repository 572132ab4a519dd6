//! The real machine: a guest on /dev/kvm.

mod boot;
mod engine;
mod error;
mod host;
mod ports;
mod ring;
mod state;
mod vcpu;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::config::{MachineConfig, MachineKind};
use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::machine::{DirtyTracking, SharedMachine};
use crate::machine_core::{Engine, MachineCore};
use crate::platform::Platform;
use crate::vcpu_threads::VcpuThreads;

use engine::KvmEngine;
use error::refused;
pub use host::host_cpu;
pub use ring::{DirtyRings, RING_ENTRIES_MAX, RING_ENTRIES_MIN};
use state::KvmState;
use vcpu::VcpuThread;

/// Makes a machine on /dev/kvm. Its RAM is untouched.
///
/// # Errors
/// [`MachineError::Config`] for a configuration that no machine can have; [`MachineError::KvmMissing`],
/// [`MachineError::KvmPermission`] and [`MachineError::KvmTooOld`] for a host without usable KVM;
/// [`MachineError::Memory`] when the host has not that much RAM to give; [`MachineError::Kvm`] when KVM
/// refuses.
pub fn new_kvm(config: MachineConfig) -> Result<SharedMachine, MachineError> {
    new(config, None)
}

/// Like [`new_kvm`], with a dirty ring of `entries` entries for each vCPU in place of KVM's dirty bitmap.
///
/// The cost of rings depends on how much the guest writes, not on its RAM: they pay where a large guest is
/// mostly idle.
///
/// # Errors
/// As for [`new_kvm`]; [`MachineError::Config`] unless `entries` is a power of two from [`RING_ENTRIES_MIN`]
/// to [`RING_ENTRIES_MAX`], and [`MachineError::NoDirtyRing`] where KVM has no such rings.
pub fn new_kvm_with_rings(config: MachineConfig, entries: u32) -> Result<SharedMachine, MachineError> {
    new(config, Some(entries))
}

fn new(config: MachineConfig, ring_entries: Option<u32>) -> Result<SharedMachine, MachineError> {
    let kvm = host::open()?;
    let most = kvm.get_max_vcpus();
    if usize::from(config.vcpus) > most {
        return Err(MachineError::Config(format!(
            "{} vCPUs are more than the {most} of this host's KVM",
            config.vcpus
        )));
    }
    let platform = Platform::new(config)?;
    let engine = KvmEngine::new(&kvm, &platform, ring_entries)?;
    let vcpu_threads = VcpuThreads::new(Some(vcpu::kick_signal()?));
    Ok(Arc::new(MachineCore::new(platform, vcpu_threads, engine)))
}

#[expect(unsafe_code, reason = "kvm-ioctls gives the VM's descriptor only as a number")]
fn borrow(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: `vm` owns the descriptor and keeps it open at least as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

impl Engine for KvmEngine {
    type State = KvmState;

    const KIND: MachineKind = MachineKind::Kvm;

    fn cpu(&self) -> &CpuDescription {
        &self.cpu
    }

    fn dirty_tracking(&self) -> DirtyTracking<'_> {
        match &self.rings {
            Some(rings) => DirtyTracking::Rings(Arc::clone(rings)),
            None => DirtyTracking::Kvm { vm: borrow(&self.vm), slots: self.slots.clone() },
        }
    }

    fn console(&self) -> Vec<u8> {
        self.console.output()
    }

    fn prepare(&self, platform: &Platform) -> Result<(), MachineError> {
        platform.prepare(self.cpu.tsc_khz)?;
        boot::write_guest(&platform.memory, platform.config.memory_bytes)?;
        platform.vcpus().try_for_each(|vcpu| boot::set_registers(&self.vcpu(vcpu), vcpu))
    }

    fn work(
        &self,
        vcpu: u8,
        platform: Arc<Platform>,
        vcpu_threads: Arc<VcpuThreads>,
    ) -> Box<dyn FnOnce() -> Result<(), String> + Send> {
        let (fd, console) = (Arc::clone(&self.vcpus[usize::from(vcpu)]), Arc::clone(&self.console));
        let rings = self.rings.clone();
        Box::new(move || {
            vcpu::run(&fd, VcpuThread::new(vcpu, &platform, &console, rings.as_deref()), &vcpu_threads)
        })
    }

    fn save(&self) -> Result<KvmState, MachineError> {
        state::save(self)
    }

    fn check(&self, state: &KvmState, platform: &Platform) -> Result<(), MachineError> {
        state::check(state, self, platform)
    }

    fn load(&self, state: &KvmState, platform: &Platform) -> Result<(), MachineError> {
        state::load(state, self)?;
        platform.vcpus().try_for_each(|vcpu| {
            let tsc_khz = self.vcpu(vcpu).get_tsc_khz().map_err(refused("tell the TSC rate"))?;
            platform.control(vcpu).adopt_tsc(tsc_khz)
        })
    }
}

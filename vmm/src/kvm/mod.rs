//! The real machine: a guest on /dev/kvm.

mod boot;
mod error;
mod host;
mod ports;
mod ring;
mod state;
mod vcpu;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::config::{MachineConfig, MachineKind};
use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::machine::{DirtyTracking, SharedMachine};
use crate::machine_core::{Engine, MachineCore};
use crate::memory::regions;
use crate::platform::Platform;
use crate::poison::IgnorePoison;
use crate::ram::MemorySlot;
use crate::vcpu_threads::VcpuThreads;

use error::refused;
pub use host::host_cpu;
use ports::Console;
pub use ring::{DirtyRings, RING_ENTRIES_MAX, RING_ENTRIES_MIN};
use state::KvmState;
use vcpu::VcpuThread;

/// The address in the hole below 4 GiB for KVM's own three pages and an identity map, if the processor needs
/// them.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The largest slot of RAM, in bytes. KVM's dirty log is read one slot at a time, under a lock of the whole
/// VM; 64 GiB have 2 MiB of bits, which still fit a processor's cache.
const SLOT_BYTES_MAX: usize = 64 << 30;

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

/// A virtual machine of KVM and its devices.
#[derive(Debug)]
pub(crate) struct KvmEngine {
    vm: Arc<VmFd>,
    /// In order. A running vCPU's thread holds the lock; any other thread waits until the vCPU stands still.
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    cpu: CpuDescription,
    slots: Vec<MemorySlot>,
    rings: Option<Arc<DirtyRings>>,
    console: Arc<Console>,
}

impl KvmEngine {
    fn new(kvm: &Kvm, platform: &Platform, ring_entries: Option<u32>) -> Result<Self, MachineError> {
        let vm = Arc::new(host::create_vm(kvm)?);
        ring_entries.map_or(Ok(()), |entries| ring::enable(&vm, entries))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(refused("set the identity map address"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(refused("set the TSS address"))?;
        vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(refused("create the timer"))?;
        let slots = memory_slots(&regions(&platform.memory));
        slots
            .iter()
            .try_for_each(|slot| host::set_slot(&vm, slot, 0))
            .map_err(refused("add a slot of RAM"))?;

        let cpuid = host::guest_cpuid(kvm)?;
        let mut vcpus = Vec::new();
        for vcpu in platform.vcpus() {
            let fd = vm.create_vcpu(u64::from(vcpu)).map_err(refused("create a vCPU"))?;
            fd.set_cpuid2(&host::cpuid_of(&cpuid, vcpu)).map_err(refused("set CPUID"))?;
            vcpus.push(fd);
        }
        let cpu = host::describe(kvm, &vm, &vcpus[0], &cpuid)?;
        let console = Arc::new(Console::new(&vm)?);
        let rings = ring_entries.map(|entries| {
            DirtyRings::new(Arc::clone(&vm), &slots, &platform.memory, &vcpus, entries).map(Arc::new)
        });
        let rings = rings.transpose()?;
        let vcpus = vcpus.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        Ok(Self { vm, vcpus, cpu, slots, rings, console })
    }

    fn vcpu(&self, vcpu: u8) -> MutexGuard<'_, VcpuFd> {
        self.vcpus[usize::from(vcpu)].lock().ignore_poison()
    }
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

/// The slots of RAM: each region in parts of [`SLOT_BYTES_MAX`].
fn memory_slots(regions: &[(u64, u64, u64)]) -> Vec<MemorySlot> {
    let parts = regions.iter().flat_map(|&(guest_address, len_bytes, host_address)| {
        (0..len_bytes).step_by(SLOT_BYTES_MAX).map(move |start| {
            let len_bytes = (len_bytes - start).min(SLOT_BYTES_MAX as u64);
            (guest_address + start, len_bytes, host_address + start)
        })
    });
    let slot_of = |(slot, (guest_address, len_bytes, host_address))| MemorySlot {
        slot,
        guest_address,
        len_bytes,
        host_address,
    };
    (0..).zip(parts).map(slot_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_cover_the_regions_in_parts_and_in_order() {
        const GIB: u64 = 1 << 30;
        let slots = memory_slots(&[(0, 3 * GIB, 7 * GIB), (4 * GIB, 130 * GIB, 1000 * GIB)]);
        let parts: Vec<_> = slots
            .iter()
            .map(|slot| {
                [slot.slot.into(), slot.guest_address / GIB, slot.len_bytes / GIB, slot.host_address / GIB]
            })
            .collect();
        assert_eq!(parts, [[0, 0, 3, 7], [1, 4, 64, 1000], [2, 68, 64, 1064], [3, 132, 2, 1128]]);
    }
}

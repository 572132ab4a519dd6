//! A virtual machine of KVM: its RAM, its vCPUs and its devices.

use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::kvm::error::refused;
use crate::kvm::host;
use crate::kvm::ports::Console;
use crate::kvm::ring::{self, DirtyRings};
use crate::memory::regions;
use crate::platform::Platform;
use crate::poison::IgnorePoison;
use crate::ram::MemorySlot;

/// The address in the hole below 4 GiB for KVM's own three pages and an identity map, if the processor needs
/// them.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The largest slot of RAM, in bytes. KVM's dirty log is read one slot at a time, under a lock of the whole
/// VM; 64 GiB have 2 MiB of bits, which still fit a processor's cache.
const SLOT_BYTES_MAX: usize = 64 << 30;

/// A virtual machine of KVM and its devices.
#[derive(Debug)]
pub(crate) struct KvmEngine {
    pub(super) vm: Arc<VmFd>,
    /// In order. A running vCPU's thread holds the lock; any other thread waits until the vCPU stands still.
    pub(super) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(super) cpu: CpuDescription,
    pub(super) slots: Vec<MemorySlot>,
    pub(super) rings: Option<Arc<DirtyRings>>,
    pub(super) console: Arc<Console>,
}

impl KvmEngine {
    pub(super) fn new(
        kvm: &Kvm,
        platform: &Platform,
        ring_entries: Option<u32>,
    ) -> Result<Self, MachineError> {
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

    pub(super) fn vcpu(&self, vcpu: u8) -> MutexGuard<'_, VcpuFd> {
        self.vcpus[usize::from(vcpu)].lock().ignore_poison()
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

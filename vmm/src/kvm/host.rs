//! This host's KVM: opening it, making a VM, and the processor that a guest gets.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address of this process")]

use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::cpu::{CpuDescription, CpuidEntry};
use crate::error::MachineError;
use crate::kvm::error::refused;
use crate::ram::MemorySlot;

/// The version of the KVM interface, unchanged since 2007.
const KVM_API_VERSION: i32 = 12;

/// The capabilities that the machine needs; Linux 4.20 has all of them.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
];

pub(crate) const MSR_TSC: u32 = 0x10;
pub(crate) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The processor that a guest gets on this host, without making a machine.
///
/// # Errors
/// As for [`new_kvm`](crate::new_kvm), except for memory.
pub fn host_cpu() -> Result<CpuDescription, MachineError> {
    let kvm = open()?;
    let vm = create_vm(&kvm)?;
    vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
    let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    let cpuid = guest_cpuid(&kvm)?;
    vcpu.set_cpuid2(&cpuid_of(&cpuid, 0)).map_err(refused("set CPUID"))?;
    describe(&kvm, &vm, &vcpu, &cpuid)
}

/// Opens /dev/kvm and checks that it can run this machine.
pub(crate) fn open() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => MachineError::KvmMissing,
        libc::EACCES | libc::EPERM => MachineError::KvmPermission,
        _ => MachineError::Kvm { doing: "open /dev/kvm".to_owned(), source: error.into() },
    })?;
    let too_old = |what: &str| Err(MachineError::KvmTooOld { what: what.to_owned() });
    if kvm.get_api_version() != KVM_API_VERSION {
        return too_old("version 12 of the KVM interface");
    }
    match NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => too_old(name),
        None => Ok(kvm),
    }
}

/// Makes a VM; retries after a signal.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(refused("create a virtual machine")),
        }
    }
}

/// Sets a slot of RAM, or only its flags if it was set before.
pub(crate) fn set_slot(vm: &VmFd, slot: &MemorySlot, flags: u32) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.len_bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the range is a mapping of the platform's RAM, shared and not owned by any Rust reference.
    // Should the VM outlive the mapping, the vCPU gets an error: KVM resolves addresses through the process's
    // page tables and finds no memory.
    unsafe { vm.set_user_memory_region(region) }
}

/// CPUID for the guest: all that KVM supports, plus the features of the in-kernel local APIC, minus features
/// without saved state.
pub(crate) fn guest_cpuid(kvm: &Kvm) -> Result<CpuId, MachineError> {
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const SHADOW_STACK: u32 = 1 << 7;
    const INDIRECT_BRANCH_TRACKING: u32 = 1 << 20;

    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("tell the supported CPUID"))?;
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                // KVM leaves the choice of the deadline timer to the VMM (Documentation/virt/kvm/api.rst,
                // KVM_GET_SUPPORTED_CPUID).
                entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            }
            (7, 0) => {
                // kvm-ioctls cannot save the shadow stack pointer.
                entry.ecx &= !SHADOW_STACK;
                entry.edx &= !INDIRECT_BRANCH_TRACKING;
            }
            _ => {}
        }
    }
    Ok(cpuid)
}

/// CPUID of one vCPU: with its APIC identifier.
pub(crate) fn cpuid_of(cpuid: &CpuId, vcpu: u8) -> CpuId {
    let mut cpuid = cpuid.clone();
    for entry in cpuid.as_mut_slice() {
        set_apic_id(entry, vcpu);
    }
    cpuid
}

fn set_apic_id(entry: &mut kvm_cpuid_entry2, vcpu: u8) {
    match entry.function {
        1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | u32::from(vcpu) << 24,
        0xb | 0x1f => entry.edx = u32::from(vcpu),
        0x8000_001e => entry.eax = u32::from(vcpu),
        _ => {}
    }
}

pub(crate) fn describe(
    kvm: &Kvm,
    vm: &VmFd,
    vcpu: &VcpuFd,
    cpuid: &CpuId,
) -> Result<CpuDescription, MachineError> {
    let mut cpuid = cpuid.clone();
    for entry in cpuid.as_mut_slice() {
        set_apic_id(entry, 0);
    }
    let entries: Vec<_> = cpuid
        .as_slice()
        .iter()
        .map(|entry| CpuidEntry {
            function: entry.function,
            index: entry.index,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        })
        .collect();
    let leaf = |function| {
        let wanted = |entry: &&CpuidEntry| entry.function == function && entry.index == 0;
        entries.iter().find(wanted).map_or([0; 4], |entry| entry.registers)
    };
    let [_, ebx, ecx, edx] = leaf(0);
    let name: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    let [xcr0_low, .., xcr0_high] = leaf(0xd);
    Ok(CpuDescription {
        vendor: String::from_utf8_lossy(&name).into_owned(),
        xcr0: u64::from(xcr0_high) << 32 | u64::from(xcr0_low),
        xsave_bytes: xsave_bytes(vm),
        msrs: state_msrs(kvm, vcpu)?,
        tsc_khz: vcpu.get_tsc_khz().map_err(refused("tell the TSC rate"))?,
        tsc_control: vm.check_extension(Cap::TscControl),
        cpuid: entries,
    })
}

/// The size of the XSAVE area: 4096 bytes before `KVM_CAP_XSAVE2`.
pub(crate) fn xsave_bytes(vm: &VmFd) -> u32 {
    u32::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096)
}

/// The model specific registers that are state: those of KVM's list that can be read and written back. Some
/// hosts list registers and then refuse them.
fn state_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, MachineError> {
    let list = kvm.get_msr_index_list().map_err(refused("list the model specific registers"))?;
    let mut state = Vec::new();
    for &index in list.as_slice() {
        if round_trips(vcpu, index) {
            state.push(index);
        } else {
            tracing::debug!(
                "model specific register {index:#x} cannot be read and set back here: it is not saved"
            );
        }
    }
    Ok(state)
}

fn round_trips(vcpu: &VcpuFd, index: u32) -> bool {
    let Ok(mut msr) = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]) else {
        return false;
    };
    let readable = matches!(vcpu.get_msrs(&mut msr), Ok(1));
    // Setting these two has an effect even with the value that was read.
    readable && (matches!(index, MSR_TSC | MSR_TSC_DEADLINE) || matches!(vcpu.set_msrs(&msr), Ok(1)))
}

/// An error without an errno from the kernel.
pub(crate) fn no_room(doing: &str) -> MachineError {
    MachineError::Kvm { doing: doing.to_owned(), source: io::ErrorKind::InvalidInput.into() }
}

//! The state of a KVM machine: saved from a paused machine, and loaded into a fresh one.
//!
//! The order in which a vCPU is restored matters. CPUID decides which values the later calls accept. The APIC
//! base in the segment registers decides how the local APIC's page is read. KVM drops the timer's deadline
//! unless the local APIC is already in deadline mode and the TSC already set.
#![expect(unsafe_code, reason = "the kernel sizes the XSAVE area")]

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::cpu::{MAX_MSRS, same_rate};
use crate::error::MachineError;
use crate::kvm::engine::KvmEngine;
use crate::kvm::error::refused;
use crate::kvm::host::{MSR_TSC, MSR_TSC_DEADLINE, no_room, xsave_bytes};
use crate::kvm::ports::ConsoleState;
use crate::platform::Platform;
use crate::snapshot::invalid;

/// vCPUs and devices of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KvmState {
    vcpus: Vec<VcpuState>,
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    console: ConsoleState,
}

#[derive(Debug, Serialize, Deserialize)]
struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// 32-bit words.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value. The TSC deadline comes last.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

pub(crate) fn save(engine: &KvmEngine) -> Result<KvmState, MachineError> {
    let vcpus = (0..).zip(&engine.vcpus).map(|(vcpu, _)| save_vcpu(engine, &engine.vcpu(vcpu)));
    let vcpus = vcpus.collect::<Result<_, _>>()?;
    let vm = &engine.vm;
    Ok(KvmState {
        vcpus,
        pic_master: irqchip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: irqchip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: irqchip(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: vm.get_pit2().map_err(refused("read the timer"))?,
        clock: vm.get_clock().map_err(refused("read the clock"))?,
        console: engine.console.save(),
    })
}

/// Finds what is wrong with a state before anything is set.
pub(crate) fn check(state: &KvmState, engine: &KvmEngine, platform: &Platform) -> Result<(), MachineError> {
    if state.vcpus.len() != usize::from(platform.config.vcpus) {
        return Err(invalid(format!("it has the registers of {} vCPUs", state.vcpus.len())));
    }
    let room_bytes = xsave_bytes(&engine.vm) as usize;
    for vcpu in &state.vcpus {
        if vcpu.cpuid.len() > KVM_MAX_CPUID_ENTRIES || vcpu.msrs.len() > MAX_MSRS {
            return Err(invalid("it has more CPUID leaves or model specific registers than KVM".to_owned()));
        }
        if vcpu.xsave.len() * 4 > room_bytes {
            return Err(MachineError::StateMismatch {
                what: "the size of the XSAVE area in bytes",
                in_state: (vcpu.xsave.len() * 4).to_string(),
                in_machine: room_bytes.to_string(),
            });
        }
    }
    Ok(())
}

pub(crate) fn load(state: &KvmState, engine: &KvmEngine) -> Result<(), MachineError> {
    let vm = &engine.vm;
    engine.console.load(&state.console)?;
    for (chip_id, chip) in [
        (KVM_IRQCHIP_PIC_MASTER, &state.pic_master),
        (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave),
        (KVM_IRQCHIP_IOAPIC, &state.ioapic),
    ] {
        vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip }).map_err(refused("set an interrupt controller"))?;
    }
    for (vcpu, vcpu_state) in (0..).zip(&state.vcpus) {
        load_vcpu(vcpu_state, engine, vcpu)?;
    }
    vm.set_pit2(&state.pit).map_err(refused("set the timer"))?;
    // Last, so that the clock stands still as briefly as possible. Its flags describe the reading, not the
    // setting.
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(refused("set the clock"))?;
    for (vcpu, _) in (0..).zip(&state.vcpus) {
        // Reports the pause to a guest with a paravirtual clock; KVM refuses the call for a guest without
        // one.
        let _ = engine.vcpu(vcpu).kvmclock_ctrl();
    }
    Ok(())
}

fn save_vcpu(engine: &KvmEngine, fd: &VcpuFd) -> Result<VcpuState, MachineError> {
    // The run state first: reading it makes KVM settle events that the rest must then show. The events last.
    let mp_state = fd.get_mp_state().map_err(refused("read the run state"))?;
    Ok(VcpuState {
        mp_state,
        regs: fd.get_regs().map_err(refused("read the registers"))?,
        sregs: fd.get_sregs().map_err(refused("read the segment registers"))?,
        xsave: save_xsave(&engine.vm, fd)?,
        xcrs: fd.get_xcrs().map_err(refused("read XCR0"))?,
        debug_regs: fd.get_debug_regs().map_err(refused("read the debug registers"))?,
        lapic: fd.get_lapic().map_err(refused("read the local APIC"))?,
        tsc_khz: fd.get_tsc_khz().map_err(refused("tell the TSC rate"))?,
        msrs: save_msrs(fd, &engine.cpu.msrs)?,
        cpuid: fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(refused("read CPUID"))?.as_slice().to_vec(),
        events: fd.get_vcpu_events().map_err(refused("read pending events"))?,
    })
}

fn load_vcpu(state: &VcpuState, engine: &KvmEngine, vcpu: u8) -> Result<(), MachineError> {
    let fd = engine.vcpu(vcpu);
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| no_room("set CPUID"))?;
    fd.set_cpuid2(&cpuid).map_err(refused("set CPUID"))?;
    let here_khz = fd.get_tsc_khz().map_err(refused("tell the TSC rate"))?;
    if !same_rate(state.tsc_khz, here_khz) && engine.vm.check_extension(Cap::TscControl) {
        fd.set_tsc_khz(state.tsc_khz).map_err(refused("set the TSC rate"))?;
    }
    fd.set_mp_state(state.mp_state).map_err(refused("set the run state"))?;
    fd.set_regs(&state.regs).map_err(refused("set the registers"))?;
    fd.set_sregs(&state.sregs).map_err(refused("set the segment registers"))?;
    load_xsave(&engine.vm, &fd, &state.xsave)?;
    fd.set_xcrs(&state.xcrs).map_err(refused("set XCR0"))?;
    fd.set_debug_regs(&state.debug_regs).map_err(refused("set the debug registers"))?;
    fd.set_lapic(&state.lapic).map_err(refused("set the local APIC"))?;
    load_msrs(&fd, vcpu, &state.msrs)?;
    fd.set_vcpu_events(&state.events).map_err(refused("set pending events"))
}

/// The registers in KVM's order, except that the timer's deadline comes last. Where the deadline has passed,
/// the timer may have fired before its interrupt reached the local APIC; a deadline of now makes it fire
/// again.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, MachineError> {
    let mut msrs = Vec::new();
    for chunk in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let wanted: Vec<_> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut entries =
            Msrs::from_entries(&wanted).map_err(|_| no_room("read model specific registers"))?;
        let read = fd.get_msrs(&mut entries).map_err(refused("read model specific registers"))?;
        if let Some(&index) = chunk.get(read) {
            let doing = format!("read model specific register {index:#x}");
            return Err(MachineError::Kvm { doing, source: std::io::ErrorKind::InvalidData.into() });
        }
        msrs.extend(entries.as_slice().iter().map(|entry| (entry.index, entry.data)));
    }
    let tsc = msrs.iter().find(|(index, _)| *index == MSR_TSC).map_or(0, |&(_, value)| value);
    for (index, value) in &mut msrs {
        if *index == MSR_TSC_DEADLINE && *value == 0 {
            *value = tsc;
        }
    }
    msrs.sort_by_key(|(index, _)| *index == MSR_TSC_DEADLINE);
    Ok(msrs)
}

fn load_msrs(fd: &VcpuFd, vcpu: u8, msrs: &[(u32, u64)]) -> Result<(), MachineError> {
    let (deadline, others): (Vec<_>, Vec<_>) = msrs.iter().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
    for chunk in others.chunks(KVM_MAX_MSR_ENTRIES).chain(deadline.chunks(KVM_MAX_MSR_ENTRIES)) {
        let wanted: Vec<_> =
            chunk.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let entries = Msrs::from_entries(&wanted).map_err(|_| no_room("set model specific registers"))?;
        let set = fd.set_msrs(&entries).map_err(refused("set model specific registers"))?;
        if let Some(&(index, value)) = chunk.get(set) {
            return Err(MachineError::Msr { vcpu, index, value });
        }
    }
    Ok(())
}

fn irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, MachineError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(refused("read an interrupt controller"))?;
    Ok(chip)
}

/// An XSAVE area as large as this kernel's KVM reads and writes.
fn empty_xsave(vm: &VmFd) -> Result<Xsave, MachineError> {
    let surplus_bytes = xsave_bytes(vm) as usize - size_of::<kvm_xsave>();
    Xsave::new(surplus_bytes.div_ceil(4)).map_err(|_| no_room("make room for XSAVE"))
}

fn save_xsave(vm: &VmFd, fd: &VcpuFd) -> Result<Vec<u32>, MachineError> {
    let mut area = empty_xsave(vm)?;
    if vm.check_extension(Cap::Xsave2) {
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 names, and no later call enables more features.
        unsafe { fd.get_xsave2(&mut area) }.map_err(refused("read XSAVE"))?;
        let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
        words.extend(area.as_slice());
        Ok(words)
    } else {
        Ok(fd.get_xsave().map_err(refused("read XSAVE"))?.region.to_vec())
    }
}

fn load_xsave(vm: &VmFd, fd: &VcpuFd, words: &[u32]) -> Result<(), MachineError> {
    let mut area = empty_xsave(vm)?;
    let mut words = words.iter().copied();
    // SAFETY: only fields are written; the length of the array behind them stays as it was allocated.
    let fixed = unsafe { area.as_mut_fam_struct() };
    fixed.xsave.region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    area.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = from);
    // SAFETY: the area is as large as KVM reads: KVM_CAP_XSAVE2, or 4096 bytes on older kernels.
    unsafe { fd.set_xsave2(&area) }.map_err(refused("set XSAVE"))
}

//! The guest's first state: its code and tables in RAM, and every vCPU set to start in 64-bit mode.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::error::MachineError;
use crate::guest::layout::{
    GDT, GIB, IDT, PAGE_TABLES, PAYLOAD, PAYLOAD_BYTES_MAX, control_page, ram_parts, stack_top,
};
use crate::guest::payload;
use crate::kvm::error::refused;
use crate::ram::{GuestRam, PAGE_BYTES};

const SELECTOR_CODE: u16 = 8;
const SELECTOR_DATA: u16 = 16;

/// Null, 64-bit code, data. The accessed bits are set, so the processor has no need to write to the table.
const GDT_ENTRIES: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const IDT_BYTES: u16 = 4096;
/// Present, ring 0, 64-bit interrupt gate.
const GATE: u64 = 0x8e << 40;

// Page table entries: present, writable, accessed, and for a leaf dirty and large.
const TABLE: u64 = 0x23;
const LARGE_PAGE: u64 = 0xe3;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Writes code, GDT, IDT and page tables.
pub(crate) fn write_guest(memory: &GuestRam, memory_bytes: u64) -> Result<(), MachineError> {
    let code = payload::code();
    if code.len() as u64 > PAYLOAD_BYTES_MAX {
        return Err(MachineError::Config("the payload is larger than its place".to_owned()));
    }
    write(memory, PAYLOAD, code)?;
    write_words(memory, GDT, &GDT_ENTRIES)?;
    for (vector, offset) in payload::handlers() {
        let handler = PAYLOAD + offset;
        let low = (handler & 0xffff) | u64::from(SELECTOR_CODE) << 16 | GATE | (handler >> 16 & 0xffff) << 48;
        write_words(memory, IDT + u64::from(vector) * 16, &[low, handler >> 32])?;
    }
    write_page_tables(memory, memory_bytes)
}

/// Maps every GiB that holds RAM onto itself, in pages of 2 MiB.
fn write_page_tables(memory: &GuestRam, memory_bytes: u64) -> Result<(), MachineError> {
    let directory_pointers = PAGE_TABLES + PAGE_BYTES;
    write_words(memory, PAGE_TABLES, &[directory_pointers | TABLE])?;
    for (start, len_bytes) in ram_parts(memory_bytes) {
        for gib in start / GIB..(start + len_bytes).div_ceil(GIB) {
            let directory = directory_pointers + (1 + gib) * PAGE_BYTES;
            write_words(memory, directory_pointers + gib * 8, &[directory | TABLE])?;
            let pages: Vec<u64> =
                (0..512).map(|page| (gib * GIB + page * LARGE_PAGE_BYTES) | LARGE_PAGE).collect();
            write_words(memory, directory, &pages)?;
        }
    }
    Ok(())
}

/// Sets a vCPU to the entry of the payload.
pub(crate) fn set_registers(fd: &VcpuFd, vcpu: u8) -> Result<(), MachineError> {
    let mut sregs = fd.get_sregs().map_err(refused("read the segment registers"))?;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: SELECTOR_CODE,
        type_: 0xb, // execute, read, accessed
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: SELECTOR_DATA, type_: 0x3, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable { base: GDT, limit: 23, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT, limit: IDT_BYTES - 1, ..Default::default() };
    sregs.cr0 = 0x8001_0031; // paging, write protect, numeric error, extension type, protection
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20; // physical address extension
    sregs.efer = 0x500; // long mode enabled and active
    sregs.apic_base |= 0xc00; // local APIC on, in x2APIC mode
    fd.set_sregs(&sregs).map_err(refused("set the segment registers"))?;

    let regs = kvm_regs {
        rip: PAYLOAD,
        rsp: stack_top(vcpu),
        rdi: control_page(vcpu),
        rflags: 2, // always one; interrupts are off
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(refused("set the registers"))?;
    // All vCPUs begin at once; none waits for a start-up interrupt.
    fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(refused("set the run state"))
}

fn write_words(memory: &GuestRam, guest_address: u64, words: &[u64]) -> Result<(), MachineError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(memory, guest_address, &bytes)
}

fn write(memory: &GuestRam, guest_address: u64, bytes: &[u8]) -> Result<(), MachineError> {
    memory
        .write_slice(bytes, GuestAddress(guest_address))
        .map_err(|source| MachineError::GuestAddress { guest_address, source })
}

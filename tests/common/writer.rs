//! The smallest guest: a vCPU that writes a byte into each of a row of pages, and halts.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use sterna::dirty::KvmSlot;
use sterna::memory::{GuestRam, PAGE_BYTES};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// `again: mov [edi], al; add edi, edx; dec ecx; jnz again; hlt`, for a flat 32-bit segment without paging.
const CODE: [u8; 8] = [0x88, 0x07, 0x01, 0xd7, 0x49, 0x75, 0xf9, 0xf4];

/// A VM and its vCPU, which makes the requested writes.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) vm: VmFd,
    pub(crate) vcpu: VcpuFd,
    pub(crate) slots: Vec<KvmSlot>,
    pub(crate) ram: GuestRam,
}

impl Writer {
    /// A guest with one region of RAM, the code in its first page, in slots of these sizes.
    ///
    /// # Panics
    /// If KVM cannot be used.
    pub(crate) fn new(slot_bytes: &[u64], prepare: impl FnOnce(&VmFd)) -> Self {
        let len_bytes = usize::try_from(slot_bytes.iter().sum::<u64>()).expect("it fits a 64-bit machine");
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len_bytes)])
            .expect("the memory can be reserved");
        memory.write_slice(&CODE, GuestAddress(0)).expect("the code fits");
        let ram = GuestRam::from_vm_memory(&memory).expect("one region of whole pages is RAM");
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("KVM can be used");
        prepare(&vm);
        let mut slots = Vec::new();
        let mut start = 0;
        for (slot, &len_bytes) in (0..).zip(slot_bytes) {
            let host_address = ram.regions()[0].host_address() + start;
            slots.push(KvmSlot { slot, guest_address: start, len_bytes, host_address });
            start += len_bytes;
        }
        slots.iter().for_each(|slot| set_slot(&vm, slot, 0));
        let vcpu = vm.create_vcpu(0).expect("a vCPU can be made");
        let mut sregs = vcpu.get_sregs().expect("a vCPU has registers");
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 0xb,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 16, type_: 3, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).expect("protected mode can be entered");
        Self { vm, vcpu, slots, ram }
    }

    /// Makes the guest write `count` pages, `stride` pages apart. Calls `full` whenever KVM reports a full
    /// dirty ring.
    pub(crate) fn write(&mut self, first_page: u64, count: u64, stride: u64, mut full: impl FnMut()) {
        let regs = kvm_regs {
            rdi: first_page * PAGE_BYTES,
            rcx: count,
            rdx: stride * PAGE_BYTES,
            rax: 1,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).expect("the registers can be set");
        loop {
            match self.vcpu.run().expect("the guest runs") {
                VcpuExit::Hlt => return,
                VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL) => full(),
                exit => panic!("the guest did something else: {exit:?}"),
            }
        }
    }
}

/// Sets a slot, or deletes it if its length is 0.
#[expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address of this process")]
pub(crate) fn set_slot(vm: &VmFd, slot: &KvmSlot, flags: u32) {
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: slot.slot,
        flags,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.len_bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the range is within the mapping that the guest's RAM keeps for as long as the VM is used.
    unsafe { vm.set_user_memory_region(region) }.expect("the slot can be set");
}

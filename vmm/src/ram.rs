//! Guest RAM as every part of a machine names it: its type, its page size, and KVM's slots of it.

use sterna_bitmap::SoftwareBitmap;
use vm_memory::GuestMemoryMmap;

/// The guest RAM of every machine: a region on each side of the hole below 4 GiB, shared mappings of one
/// memfd.
///
/// The bitmap lists the pages that the VMM itself wrote since the last read of the bitmap. Pages that the
/// vCPUs of a KVM machine wrote are in KVM's own log, and enter the bitmap only when dirty rings are
/// [collected](crate::DirtyRings::collect).
pub type GuestRam = GuestMemoryMmap<SoftwareBitmap>;

/// The page size of this crate, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// One slot of RAM as KVM has it (`struct kvm_userspace_memory_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number for the slot.
    pub slot: u32,
    /// Its guest address.
    pub guest_address: u64,
    /// Its length in bytes, a multiple of 4 KiB.
    pub len_bytes: u64,
    /// Its address in this process.
    pub host_address: u64,
}

//! Memory that a device may read and write.

/// Memory mapped into this process that can be registered with a device: guest RAM, a mapped file, a ring.
///
/// A [`MemoryRegion`](crate::MemoryRegion) holds the mapping it was registered from, so the memory cannot be
/// unmapped while a device may still access it.
///
/// # Safety
///
/// For as long as the value lives,
///
/// - `as_ptr` returns the same address and `len_bytes` the same length at every call;
/// - all of those bytes stay mapped at that address, readable, and writable too if the region is registered
///   with an access that writes ([`Access::LocalWrite`](crate::Access::LocalWrite),
///   [`Access::RemoteWrite`](crate::Access::RemoteWrite));
/// - no Rust reference to any of those bytes exists: the device, the peer and the guest read and write them
///   at any moment, so code accesses them through raw pointers and volatile accesses only.
pub unsafe trait Mapping: Send + Sync + 'static {
    /// The first byte.
    fn as_ptr(&self) -> *mut u8;

    /// How many bytes are mapped from that address on.
    fn len_bytes(&self) -> usize;
}

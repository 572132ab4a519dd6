//! A registered piece of a mapping.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::check;
use super::domain::Domain;
use super::mapping::Mapping;
use super::structs::ibv_mr;
use crate::error::Error;

/// Memory pinned and translated for the device. Holds the mapping, so deregistration precedes unmapping.
pub(crate) struct Region {
    pointer: NonNull<ibv_mr>,
    pub(super) domain: Arc<Domain>,
    address: u64,
    len_bytes: usize,
    local_key: u32,
    remote_key: u32,
    /// The last field, so that it outlives the registration.
    _mapping: Arc<dyn Mapping>,
    deregistered: bool,
}

// SAFETY: libibverbs is thread-safe, the region is deregistered by the last owner only, and Mapping is Send
// and Sync.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Registers `len_bytes` bytes from `offset_bytes` on; an error is the errno of `ibv_reg_mr`.
    ///
    /// The caller has checked that the piece lies inside the mapping.
    pub(crate) fn register(
        domain: &Arc<Domain>,
        mapping: Arc<dyn Mapping>,
        offset_bytes: usize,
        len_bytes: usize,
        access: c_int,
    ) -> Result<Region, io::Error> {
        let inside = offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= mapping.len_bytes());
        assert!(inside, "a region of {len_bytes} bytes at {offset_bytes} must lie inside its mapping");
        // SAFETY: the offset was just checked to lie inside the mapping.
        let start = unsafe { mapping.as_ptr().add(offset_bytes) };
        // SAFETY: the domain is live; the piece is mapped and stays so, and the device may access it at any
        // time, as the contract of Mapping allows. The region holds the mapping until after it is
        // deregistered.
        let pointer = unsafe {
            (domain.context.functions.reg_mr)(domain.pointer.as_ptr(), start.cast(), len_bytes, access)
        };
        let Some(pointer) = NonNull::new(pointer) else {
            return Err(io::Error::last_os_error());
        };
        // SAFETY: the library just filled the struct, laid out as declared.
        let &ibv_mr { lkey, rkey, .. } = unsafe { pointer.as_ref() };
        Ok(Region {
            pointer,
            domain: Arc::clone(domain),
            address: start.expose_provenance() as u64,
            len_bytes,
            local_key: lkey,
            remote_key: rkey,
            _mapping: mapping,
            deregistered: false,
        })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(super) fn local_key(&self) -> u32 {
        self.local_key
    }

    pub(crate) fn remote_key(&self) -> u32 {
        self.remote_key
    }
}

impl Region {
    /// Deregisters the region, as dropping does, and returns whether that worked.
    pub(crate) fn deregister(mut self) -> Result<(), Error> {
        self.deregister_once()
    }

    fn deregister_once(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.deregistered, true) {
            return Ok(());
        }
        // SAFETY: the pointer is live, because the region is deregistered in this place only, and once. Queue
        // pairs that posted from the region hold an Arc of it until they are destroyed or have released it.
        // The device fails a request that is outstanding even so, and accesses no memory.
        let result = unsafe { (self.domain.context.functions.dereg_mr)(self.pointer.as_ptr()) };
        check("ibv_dereg_mr", result)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // A drop cannot report a failure; a caller that needs the result calls `deregister`.
        let _ = self.deregister_once();
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Region").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

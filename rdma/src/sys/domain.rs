//! A protection domain.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::context::Context;
use super::last_error;
use super::structs::ibv_pd;
use crate::error::Error;

/// Lets its regions and queue pairs work together and keeps out those of other domains.
pub(crate) struct Domain {
    pub(super) pointer: NonNull<ibv_pd>,
    pub(super) context: Arc<Context>,
}

// SAFETY: libibverbs is thread-safe, and the domain is freed by the last owner only.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(crate) fn allocate(context: &Arc<Context>) -> Result<Arc<Domain>, Error> {
        // SAFETY: the context is open.
        let pointer = unsafe { (context.functions.alloc_pd)(context.pointer.as_ptr()) };
        let pointer = NonNull::new(pointer).ok_or_else(|| last_error("ibv_alloc_pd"))?;
        Ok(Arc::new(Domain { pointer, context: Arc::clone(context) }))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: every region and queue pair holds an Arc of its domain, so none is left; the domain is
        // freed in this place only.
        unsafe { (self.context.functions.dealloc_pd)(self.pointer.as_ptr()) };
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Domain").finish_non_exhaustive()
    }
}

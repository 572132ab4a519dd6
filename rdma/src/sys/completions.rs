//! A completion queue and the channel that wakes its owner.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::context::Context;
use super::structs::{ibv_comp_channel, ibv_cq, ibv_wc};
use super::{check, last_error, os};
use crate::error::Error;

/// How many completions one call takes from the queue.
pub(crate) const POLL_MAX: usize = 16;

/// The device's queue of events for one completion queue.
struct Channel {
    pointer: NonNull<ibv_comp_channel>,
    context: Arc<Context>,
}

impl Channel {
    fn create(context: &Arc<Context>) -> Result<Channel, Error> {
        // SAFETY: the context is open.
        let pointer = unsafe { (context.functions.create_comp_channel)(context.pointer.as_ptr()) };
        let pointer = NonNull::new(pointer).ok_or_else(|| last_error("ibv_create_comp_channel"))?;
        let channel = Channel { pointer, context: Arc::clone(context) };
        os::set_nonblocking(channel.fd()).map_err(|source| Error::Call { call: "fcntl", source })?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the library laid the channel out as declared; the field does not change while it lives.
        let fd = unsafe { (*self.pointer.as_ptr()).fd };
        // SAFETY: the descriptor stays open until the channel is destroyed, and the channel outlives this
        // borrow of self.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: its one completion queue was destroyed first; the channel is destroyed in this place only.
        unsafe { (self.context.functions.destroy_comp_channel)(self.pointer.as_ptr()) };
    }
}

/// A completion queue with a channel of its own.
pub(crate) struct Completions {
    pub(super) pointer: NonNull<ibv_cq>,
    /// Dropped after the queue: fields go after the value's own `drop`.
    channel: Channel,
}

// SAFETY: libibverbs is thread-safe, and the queue is destroyed by the last owner only.
unsafe impl Send for Completions {}
// SAFETY: as above; the queue takes a lock while it is polled.
unsafe impl Sync for Completions {}

impl Completions {
    pub(crate) fn create(context: &Arc<Context>, entries: c_int) -> Result<Arc<Completions>, Error> {
        let channel = Channel::create(context)?;
        let vector = context.next_completion_vector();
        // SAFETY: the context is open, the channel belongs to it, and the vector is below the context's
        // count.
        let pointer = unsafe {
            (context.functions.create_cq)(
                context.pointer.as_ptr(),
                entries,
                ptr::null_mut(),
                channel.pointer.as_ptr(),
                vector,
            )
        };
        let pointer = NonNull::new(pointer).ok_or_else(|| last_error("ibv_create_cq"))?;
        Ok(Arc::new(Completions { pointer, channel }))
    }

    /// How many completions fit.
    pub(crate) fn capacity(&self) -> usize {
        // SAFETY: the library laid the queue out as declared; the field changes on resize only, which Sterna
        // never does.
        let entries = unsafe { (*self.pointer.as_ptr()).cqe };
        usize::try_from(entries).unwrap_or(0)
    }

    /// Takes up to `limit` completions (at most [`POLL_MAX`]) into `entries`; returns their number.
    pub(crate) fn poll(&self, entries: &mut [ibv_wc; POLL_MAX], limit: usize) -> Result<usize, Error> {
        let limit = c_int::try_from(limit.min(POLL_MAX)).unwrap_or(0);
        // SAFETY: the context is open, and its providers filled the operations when it was opened.
        let poll_cq = unsafe { (*self.context().pointer.as_ptr()).ops.poll_cq };
        // SAFETY: the queue is live and `entries` is writable for at least `limit` elements.
        let taken = unsafe { poll_cq(self.pointer.as_ptr(), limit, entries.as_mut_ptr()) };
        // A negative result is the provider's own: errno need not be set.
        usize::try_from(taken).map_err(|_| Error::Call {
            call: "ibv_poll_cq",
            source: io::Error::from_raw_os_error(
                taken.checked_neg().filter(|errno| *errno > 1).unwrap_or(libc::EIO),
            ),
        })
    }

    /// Asks for one event at the next completion.
    pub(crate) fn arm(&self) -> Result<(), Error> {
        // SAFETY: the context is open, and its providers filled the operations when it was opened.
        let req_notify_cq = unsafe { (*self.context().pointer.as_ptr()).ops.req_notify_cq };
        // SAFETY: the queue is live.
        let result = unsafe { req_notify_cq(self.pointer.as_ptr(), 0) };
        check("ibv_req_notify_cq", result)
    }

    /// Readable when an event waits; a read does not block.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// Takes and acknowledges one event, if one waits.
    pub(crate) fn take_event(&self) -> Result<bool, Error> {
        let mut queue = ptr::null_mut();
        let mut user = ptr::null_mut();
        // SAFETY: the channel is live, and both outputs are writable pointers.
        let result = unsafe {
            (self.context().functions.get_cq_event)(
                self.channel.pointer.as_ptr(),
                &raw mut queue,
                &raw mut user,
            )
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(Error::Call { call: "ibv_get_cq_event", source: error }),
            };
        }
        // SAFETY: the event belongs to this queue, the channel's only one; the destroy waits for each event
        // to be acknowledged once.
        unsafe { (self.context().functions.ack_cq_events)(self.pointer.as_ptr(), 1) };
        Ok(true)
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.channel.context
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: every queue pair holds an Arc of its completion queues, so none is left, and every event
        // was acknowledged when taken; the queue is destroyed in this place only.
        unsafe { (self.context().functions.destroy_cq)(self.pointer.as_ptr()) };
    }
}

impl fmt::Debug for Completions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Completions").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

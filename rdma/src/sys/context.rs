//! The list of devices, and a device held open.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::constants::{
    IBV_EVENT_CLIENT_REREGISTER, IBV_EVENT_COMM_EST, IBV_EVENT_GID_CHANGE, IBV_EVENT_LID_CHANGE,
    IBV_EVENT_PATH_MIG, IBV_EVENT_PATH_MIG_ERR, IBV_EVENT_PKEY_CHANGE, IBV_EVENT_PORT_ACTIVE,
    IBV_EVENT_PORT_ERR, IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED,
    IBV_EVENT_QP_REQ_ERR, IBV_EVENT_SM_CHANGE, IBV_EVENT_SQ_DRAINED,
};
use super::functions::Functions;
use super::structs::{
    ibv_async_event, ibv_context, ibv_device, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_port_attr, ibv_qp,
};
use super::{check, os};
use crate::error::Error;

/// The bound on a device's GID entries; a larger count is refused as implausible.
const GID_ENTRIES_MAX: usize = 1 << 16;

/// The devices as `ibv_get_device_list` found them.
pub(crate) struct DeviceList {
    functions: Arc<Functions>,
    list: NonNull<*mut ibv_device>,
    count: usize,
}

impl DeviceList {
    /// Empty when the kernel has no RDMA at all.
    pub(crate) fn get(functions: &Arc<Functions>) -> Result<Option<DeviceList>, Error> {
        let mut count: c_int = 0;
        // SAFETY: `count` is a writable int for the length of the call.
        let list = unsafe { (functions.get_device_list)(&raw mut count) };
        let Some(list) = NonNull::new(list) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSYS) => Ok(None),
                _ => Err(Error::Call { call: "ibv_get_device_list", source: error }),
            };
        };
        Ok(Some(DeviceList {
            functions: Arc::clone(functions),
            list,
            count: usize::try_from(count).unwrap_or(0),
        }))
    }

    /// The number of devices; every method below takes an index under it.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The kernel's name, such as `mlx5_0`.
    pub(crate) fn name(&self, index: usize) -> String {
        let device = self.device(index);
        // SAFETY: `device` is an entry of a list not yet freed.
        let name = unsafe { (self.functions.get_device_name)(device) };
        if name.is_null() {
            return String::new();
        }
        // SAFETY: a name that is not null is a C string inside the device, which lives as long as the list.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    /// The node GUID in host order.
    pub(crate) fn guid(&self, index: usize) -> u64 {
        let device = self.device(index);
        // SAFETY: `device` is an entry of a list not yet freed.
        u64::from_be(unsafe { (self.functions.get_device_guid)(device) })
    }

    /// An `ibv_transport_type`.
    pub(crate) fn transport(&self, index: usize) -> c_int {
        let device = self.device(index);
        // SAFETY: `device` is an entry of a list not yet freed, and the library laid it out as declared.
        unsafe { (*device).transport_type }
    }

    /// Opens a device; it stays open after the list is freed.
    pub(crate) fn open(&self, index: usize) -> Result<Arc<Context>, Error> {
        let device = self.device(index);
        // SAFETY: `device` is an entry of a list not yet freed.
        let context = unsafe { (self.functions.open_device)(device) };
        let Some(pointer) = NonNull::new(context) else {
            let source = io::Error::last_os_error();
            return Err(Error::Open { device: self.name(index), source });
        };
        let context = Context {
            functions: Arc::clone(&self.functions),
            pointer,
            next_completion_vector: AtomicU32::new(0),
        };
        os::set_nonblocking(context.async_fd()).map_err(|source| Error::Call { call: "fcntl", source })?;
        Ok(Arc::new(context))
    }

    fn device(&self, index: usize) -> *mut ibv_device {
        assert!(index < self.count, "device {index} of a list of {}", self.count);
        let entry = self.list.as_ptr().wrapping_add(index);
        // SAFETY: the list has `count` entries and `index` was checked against it.
        unsafe { *entry }
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from ibv_get_device_list and is freed in this place only.
        unsafe { (self.functions.free_device_list)(self.list.as_ptr()) };
    }
}

/// An open device.
pub(crate) struct Context {
    pub(super) functions: Arc<Functions>,
    pub(super) pointer: NonNull<ibv_context>,
    next_completion_vector: AtomicU32,
}

// SAFETY: libibverbs is thread-safe, and the context is closed by the last owner only.
unsafe impl Send for Context {}
// SAFETY: as above: verbs on one context may run in several threads at once.
unsafe impl Sync for Context {}

/// The object that an asynchronous event names.
pub(crate) struct RawEvent {
    pub(crate) event_type: c_int,
    pub(crate) port: Option<u8>,
    pub(crate) queue_pair: Option<u32>,
}

impl Context {
    pub(crate) fn query_device(&self) -> Result<ibv_device_attr, Error> {
        let mut attributes = zeroed::<ibv_device_attr>();
        // SAFETY: the context is open and `attributes` is a writable ibv_device_attr.
        let result = unsafe { (self.functions.query_device)(self.pointer.as_ptr(), &raw mut attributes) };
        check("ibv_query_device", result)?;
        Ok(attributes)
    }

    pub(crate) fn query_port(&self, port: u8) -> Result<ibv_port_attr, Error> {
        let mut attributes = zeroed::<ibv_port_attr>();
        // SAFETY: the context is open; the exported symbol writes no further than `flags`, which this crate's
        // struct contains.
        let result = unsafe { (self.functions.query_port)(self.pointer.as_ptr(), port, &raw mut attributes) };
        check("ibv_query_port", result)?;
        Ok(attributes)
    }

    /// The valid entries of all ports' GID tables; `entries_max` is the sum of the tables' lengths.
    pub(crate) fn gid_entries(&self, entries_max: usize) -> Result<Vec<ibv_gid_entry>, Error> {
        let empty = ibv_gid_entry {
            gid: ibv_gid { raw: [0; 2] },
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        let mut entries = vec![empty; entries_max.min(GID_ENTRIES_MAX)];
        // SAFETY: `entries` is writable for the count passed, and the entry size is that of this crate's
        // struct.
        let found = unsafe {
            (self.functions.query_gid_table)(
                self.pointer.as_ptr(),
                entries.as_mut_ptr(),
                entries.len(),
                0,
                size_of::<ibv_gid_entry>(),
            )
        };
        let Ok(found) = usize::try_from(found) else {
            let errno = i32::try_from(found.unsigned_abs()).unwrap_or(libc::EINVAL);
            let source = io::Error::from_raw_os_error(errno);
            return Err(Error::Call { call: "ibv_query_gid_table", source });
        };
        entries.truncate(found);
        Ok(entries)
    }

    /// Readable when an asynchronous event waits; a read does not block.
    pub(crate) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the library laid the open context out as declared; the field does not change while it is
        // open.
        let fd = unsafe { (*self.pointer.as_ptr()).async_fd };
        // SAFETY: the descriptor stays open until the context is closed, and the context outlives this borrow
        // of self.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Takes and acknowledges the next asynchronous event, if one waits.
    pub(crate) fn next_event(&self) -> Result<Option<RawEvent>, Error> {
        let mut event = zeroed::<ibv_async_event>();
        // SAFETY: the context is open and `event` is a writable ibv_async_event.
        let result = unsafe { (self.functions.get_async_event)(self.pointer.as_ptr(), &raw mut event) };
        if result != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(Error::Call { call: "ibv_get_async_event", source: error }),
            };
        }
        let mut raw = RawEvent { event_type: event.event_type, port: None, queue_pair: None };
        match event.event_type {
            IBV_EVENT_QP_FATAL
            | IBV_EVENT_QP_REQ_ERR
            | IBV_EVENT_QP_ACCESS_ERR
            | IBV_EVENT_COMM_EST
            | IBV_EVENT_SQ_DRAINED
            | IBV_EVENT_PATH_MIG
            | IBV_EVENT_PATH_MIG_ERR
            | IBV_EVENT_QP_LAST_WQE_REACHED => {
                let queue_pair = event.element.cast::<ibv_qp>();
                // SAFETY: these events carry a queue pair, and destroying it waits until the event is
                // acknowledged below.
                raw.queue_pair = Some(unsafe { (*queue_pair).qp_num });
            }
            IBV_EVENT_PORT_ACTIVE
            | IBV_EVENT_PORT_ERR
            | IBV_EVENT_LID_CHANGE
            | IBV_EVENT_PKEY_CHANGE
            | IBV_EVENT_SM_CHANGE
            | IBV_EVENT_CLIENT_REREGISTER
            | IBV_EVENT_GID_CHANGE => {
                // These carry an int in the union's first four bytes. SAFETY: the union was zeroed and then
                // written by the library; an int lies at its start.
                let port = unsafe { (&raw const event.element).cast::<c_int>().read() };
                raw.port = u8::try_from(port).ok();
            }
            _ => {}
        }
        // SAFETY: `event` was returned by ibv_get_async_event and is acknowledged once, by this call.
        unsafe { (self.functions.ack_async_event)(&raw mut event) };
        Ok(Some(raw))
    }

    /// Spreads completion queues over the interrupts that the device offers.
    pub(super) fn next_completion_vector(&self) -> c_int {
        // SAFETY: the library laid the open context out as declared; the field does not change while it is
        // open.
        let vectors = unsafe { (*self.pointer.as_ptr()).num_comp_vectors };
        let turn = self.next_completion_vector.fetch_add(1, Ordering::Relaxed);
        let vectors = u32::try_from(vectors).unwrap_or(1).max(1);
        c_int::try_from(turn % vectors).unwrap_or(0)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: every object made from the context holds an Arc of the context, so none is left; the
        // context is closed in this place only.
        unsafe { (self.functions.close_device)(self.pointer.as_ptr()) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Context").finish_non_exhaustive()
    }
}

/// An attribute struct of zeros, for the library to fill.
fn zeroed<T: Plain>() -> T {
    // SAFETY: `Plain` promises that zeros are a valid value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// A C struct of integers and nullable pointers.
///
/// # Safety
/// All zeros must be a valid value.
unsafe trait Plain {}
// SAFETY: integers only.
unsafe impl Plain for ibv_device_attr {}
// SAFETY: integers only.
unsafe impl Plain for ibv_port_attr {}
// SAFETY: an integer and a raw pointer.
unsafe impl Plain for ibv_async_event {}

//! libibverbs itself: located at run time, its entry points resolved by name.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use super::structs::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid_entry,
    ibv_mr, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};
use crate::error::Error;

/// The soname that every rdma-core since 2009 installs.
const SONAME: &str = "libibverbs.so.1";

/// Declares the table of entry points and the code that fills it.
macro_rules! functions {
    ($( $field:ident = $symbol:literal : fn( $($argument:ident : $type:ty),* ) $(-> $result:ty)?; )+) => {
        /// The entry points of libibverbs that Sterna calls.
        #[derive(Debug)]
        pub(crate) struct Functions {
            $( pub(crate) $field: unsafe extern "C" fn( $($argument: $type),* ) $(-> $result)?, )+
        }

        impl Functions {
            fn take_from(library: &libloading::Library) -> Result<Functions, Error> {
                Ok(Functions { $(
                    $field: {
                        // SAFETY: the type is the one the C header declares for this symbol. dlsym without a
                        // version returns the default version, which is the one the header describes.
                        let symbol = unsafe { library.get($symbol.as_bytes()) };
                        *symbol.map_err(|_| Error::LibraryTooOld { symbol: $symbol })?
                    },
                )+ })
            }
        }
    };
}

functions! {
    get_device_list = "ibv_get_device_list": fn(count: *mut c_int) -> *mut *mut ibv_device;
    free_device_list = "ibv_free_device_list": fn(list: *mut *mut ibv_device);
    get_device_name = "ibv_get_device_name": fn(device: *mut ibv_device) -> *const c_char;
    get_device_guid = "ibv_get_device_guid": fn(device: *mut ibv_device) -> u64;
    open_device = "ibv_open_device": fn(device: *mut ibv_device) -> *mut ibv_context;
    close_device = "ibv_close_device": fn(context: *mut ibv_context) -> c_int;
    query_device = "ibv_query_device":
        fn(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int;
    query_port = "ibv_query_port":
        fn(context: *mut ibv_context, port: u8, attributes: *mut ibv_port_attr) -> c_int;
    query_gid_table = "_ibv_query_gid_table":
        fn(
            context: *mut ibv_context,
            entries: *mut ibv_gid_entry,
            max_entries: usize,
            flags: u32,
            entry_size: usize
        ) -> isize;
    get_async_event = "ibv_get_async_event":
        fn(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    ack_async_event = "ibv_ack_async_event": fn(event: *mut ibv_async_event);
    alloc_pd = "ibv_alloc_pd": fn(context: *mut ibv_context) -> *mut ibv_pd;
    dealloc_pd = "ibv_dealloc_pd": fn(pd: *mut ibv_pd) -> c_int;
    reg_mr = "ibv_reg_mr":
        fn(pd: *mut ibv_pd, address: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
    dereg_mr = "ibv_dereg_mr": fn(mr: *mut ibv_mr) -> c_int;
    create_comp_channel = "ibv_create_comp_channel": fn(context: *mut ibv_context) -> *mut ibv_comp_channel;
    destroy_comp_channel = "ibv_destroy_comp_channel": fn(channel: *mut ibv_comp_channel) -> c_int;
    create_cq = "ibv_create_cq":
        fn(
            context: *mut ibv_context,
            entries: c_int,
            cq_context: *mut c_void,
            channel: *mut ibv_comp_channel,
            vector: c_int
        ) -> *mut ibv_cq;
    destroy_cq = "ibv_destroy_cq": fn(cq: *mut ibv_cq) -> c_int;
    get_cq_event = "ibv_get_cq_event":
        fn(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) -> c_int;
    ack_cq_events = "ibv_ack_cq_events": fn(cq: *mut ibv_cq, count: c_uint);
    create_qp = "ibv_create_qp": fn(pd: *mut ibv_pd, attributes: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    modify_qp = "ibv_modify_qp": fn(qp: *mut ibv_qp, attributes: *mut ibv_qp_attr, mask: c_int) -> c_int;
    destroy_qp = "ibv_destroy_qp": fn(qp: *mut ibv_qp) -> c_int;
}

impl Functions {
    /// Finds libibverbs the way the system finds any shared library.
    pub(crate) fn load() -> Result<Arc<Functions>, Error> {
        // SAFETY: libibverbs' initialisers only set up its own tables; every RDMA program links this library.
        let library = unsafe { libloading::Library::new(SONAME) };
        let library = library.map_err(|cause| Error::LibraryNotFound { reason: cause.to_string() })?;
        let functions = Functions::take_from(&library)?;
        // Never unloaded: it loads drivers that keep pointers into it, and a second load is then free.
        std::mem::forget(library);
        Ok(Arc::new(functions))
    }
}

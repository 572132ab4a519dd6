//! A reliable-connected queue pair.

use std::collections::HashMap;
use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::completions::Completions;
use super::constants::{IBV_QPT_RC, IBV_SEND_SIGNALED, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE_WITH_IMM};
use super::domain::Domain;
use super::region::Region;
use super::requests::{RawTransfer, Requests, blank_request, segment_of};
use super::structs::{
    ibv_ah_attr, ibv_gid, ibv_global_route, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr,
    ibv_send_wr,
};
use super::{check, last_error};
use crate::error::Error;

/// A queue pair and everything that it may be using.
pub(crate) struct QueuePair {
    pointer: NonNull<ibv_qp>,
    domain: Arc<Domain>,
    _send_completions: Arc<Completions>,
    _receive_completions: Arc<Completions>,
    /// Every region that a request of this queue pair has named and that was not released, by its address in
    /// this process: the device may read from it until the queue pair is destroyed.
    regions: HashMap<*const Region, Arc<Region>>,
    destroyed: bool,
}

// SAFETY: libibverbs is thread-safe, the queue pair is destroyed by the last owner only, and the raw pointers
// among the keys are compared, never followed.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

/// Why a provider refused a list, and after how many requests.
pub(crate) struct Refused {
    pub(crate) posted: usize,
    pub(crate) source: io::Error,
}

impl QueuePair {
    /// Creates a queue pair in RESET. `capacity` is updated to what the provider granted.
    pub(crate) fn create(
        domain: &Arc<Domain>,
        send_completions: &Arc<Completions>,
        receive_completions: &Arc<Completions>,
        capacity: &mut ibv_qp_cap,
    ) -> Result<QueuePair, Error> {
        let mut attributes = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: send_completions.pointer.as_ptr(),
            recv_cq: receive_completions.pointer.as_ptr(),
            srq: ptr::null_mut(),
            cap: *capacity,
            qp_type: IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the domain and both completion queues are live; `attributes` is initialised and writable.
        let pointer =
            unsafe { (domain.context.functions.create_qp)(domain.pointer.as_ptr(), &raw mut attributes) };
        let pointer = NonNull::new(pointer).ok_or_else(|| last_error("ibv_create_qp"))?;
        *capacity = attributes.cap;
        Ok(QueuePair {
            pointer,
            domain: Arc::clone(domain),
            _send_completions: Arc::clone(send_completions),
            _receive_completions: Arc::clone(receive_completions),
            regions: HashMap::new(),
            destroyed: false,
        })
    }

    /// The number that the peer addresses, 24 bits.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the library laid the queue pair out as declared; the number does not change.
        unsafe { (*self.pointer.as_ptr()).qp_num }
    }

    /// Changes the attributes that `mask` names.
    pub(crate) fn modify(&mut self, attributes: &mut ibv_qp_attr, mask: c_int) -> Result<(), Error> {
        // SAFETY: the queue pair is live and `attributes` is an initialised ibv_qp_attr.
        let result =
            unsafe { (self.domain.context.functions.modify_qp)(self.pointer.as_ptr(), attributes, mask) };
        check("ibv_modify_qp", result)
    }

    /// Whether a region was registered in this queue pair's protection domain.
    pub(crate) fn accepts(&self, region: &Region) -> bool {
        Arc::ptr_eq(&self.domain, &region.domain)
    }

    /// Whether [`accepts`](Self::accepts) holds for every region of a list.
    pub(crate) fn accepts_all(&self, requests: &Requests) -> bool {
        requests.regions().iter().all(|region| self.accepts(region))
    }

    /// Posts the whole list with one doorbell and empties it.
    pub(crate) fn post_writes(&mut self, requests: &mut Requests) -> Result<(), Refused> {
        if requests.len() == 0 {
            return Ok(());
        }
        for region in requests.regions() {
            self.keep(region);
        }
        let mut first_refused: *mut ibv_send_wr = ptr::null_mut();
        // SAFETY: the chain ends in null; its requests point at live segments, and the queue pair just kept
        // their regions.
        let result = requests.with_chain(|head| unsafe { self.post_send(head, &raw mut first_refused) });
        let outcome = result.map_err(|source| {
            let posted = if first_refused.is_null() { 0 } else { requests.index_of(first_refused) };
            Refused { posted, source }
        });
        requests.clear();
        outcome
    }

    /// Posts one read of the peer's memory into `region`.
    pub(crate) fn post_read(
        &mut self,
        region: &Arc<Region>,
        transfer: &RawTransfer,
    ) -> Result<(), io::Error> {
        self.keep(region);
        let mut segment = segment_of(region, transfer);
        let mut request = blank_request(IBV_WR_RDMA_READ);
        request.wr_id = transfer.id;
        request.sg_list = &raw mut segment;
        request.num_sge = 1;
        request.send_flags = if transfer.signalled { IBV_SEND_SIGNALED } else { 0 };
        request.wr.remote_addr = transfer.remote_address;
        request.wr.rkey = transfer.remote_key;
        let mut refused = ptr::null_mut();
        // SAFETY: one request; its segment lives through the call, and its region was just kept.
        unsafe { self.post_send(&raw mut request, &raw mut refused) }
    }

    /// Posts a write of no bytes that carries `immediate` and is signalled.
    pub(crate) fn post_write_immediate(&mut self, immediate: u32, id: u64) -> Result<(), io::Error> {
        let mut request = blank_request(IBV_WR_RDMA_WRITE_WITH_IMM);
        request.wr_id = id;
        request.send_flags = IBV_SEND_SIGNALED;
        request.imm_data = immediate.to_be();
        let mut refused = ptr::null_mut();
        // SAFETY: one request, which names no memory.
        unsafe { self.post_send(&raw mut request, &raw mut refused) }
    }

    /// Posts a receive without a buffer: enough for an immediate.
    pub(crate) fn post_receive(&mut self, id: u64) -> Result<(), io::Error> {
        let mut request =
            ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 0 };
        let mut refused = ptr::null_mut();
        // SAFETY: the context is open, and its provider filled the operations when it was opened.
        let post_recv = unsafe { (*self.domain.context.pointer.as_ptr()).ops.post_recv };
        // SAFETY: the queue pair is live; one request, which names no memory.
        let result = unsafe { post_recv(self.pointer.as_ptr(), &raw mut request, &raw mut refused) };
        posted(result)
    }

    /// Releases a region.
    pub(crate) fn release(&mut self, region: &Region) {
        self.regions.remove(&ptr::from_ref(region));
    }

    /// Holds a region until it is released or the queue pair is destroyed.
    fn keep(&mut self, region: &Arc<Region>) {
        self.regions.entry(Arc::as_ptr(region)).or_insert_with(|| Arc::clone(region));
    }

    /// # Safety
    /// `head` must be a chain of initialised requests that ends in null; their segments live through the call
    /// and lie in regions that this queue pair keeps.
    unsafe fn post_send(
        &self,
        head: *mut ibv_send_wr,
        refused: *mut *mut ibv_send_wr,
    ) -> Result<(), io::Error> {
        // SAFETY: the context is open, and its provider filled the operations when it was opened.
        let post_send = unsafe { (*self.domain.context.pointer.as_ptr()).ops.post_send };
        // SAFETY: the queue pair is live; the rest is this function's own contract.
        let result = unsafe { post_send(self.pointer.as_ptr(), head, refused) };
        posted(result)
    }
}

impl QueuePair {
    /// Destroys the queue pair, as dropping does, and returns whether that worked.
    pub(crate) fn destroy(mut self) -> Result<(), Error> {
        self.destroy_once()
    }

    fn destroy_once(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.destroyed, true) {
            return Ok(());
        }
        // SAFETY: destroyed in this place only, and once; what it used is released after it, field by field.
        let result = unsafe { (self.domain.context.functions.destroy_qp)(self.pointer.as_ptr()) };
        check("ibv_destroy_qp", result)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // A drop cannot report a failure; a caller that needs the result calls `destroy`.
        let _ = self.destroy_once();
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("QueuePair").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}

/// The result of a post: an errno, or -1 with `errno` set from old providers.
fn posted(result: c_int) -> Result<(), io::Error> {
    match result {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(result)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Attributes of zeros, to be filled before [`QueuePair::modify`].
pub(crate) fn blank_attributes() -> ibv_qp_attr {
    let route = ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: [0; 2] },
            flow_label: 0,
            sgid_index: 0,
            hop_limit: 0,
            traffic_class: 0,
        },
        dlid: 0,
        sl: 0,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 0,
        port_num: 0,
    };
    ibv_qp_attr {
        qp_state: 0,
        cur_qp_state: 0,
        path_mtu: 0,
        path_mig_state: 0,
        qkey: 0,
        rq_psn: 0,
        sq_psn: 0,
        dest_qp_num: 0,
        qp_access_flags: 0,
        cap: ibv_qp_cap {
            max_send_wr: 0,
            max_recv_wr: 0,
            max_send_sge: 0,
            max_recv_sge: 0,
            max_inline_data: 0,
        },
        ah_attr: route,
        alt_ah_attr: route,
        pkey_index: 0,
        alt_pkey_index: 0,
        en_sqd_async_notify: 0,
        sq_draining: 0,
        max_rd_atomic: 0,
        max_dest_rd_atomic: 0,
        min_rnr_timer: 0,
        port_num: 0,
        timeout: 0,
        retry_cnt: 0,
        rnr_retry: 0,
        alt_port_num: 0,
        alt_timeout: 0,
        rate_limit: 0,
    }
}

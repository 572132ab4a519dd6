//! A preallocated, pre-linked chain of work requests, each with one segment of local memory.

use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::constants::{IBV_SEND_SIGNALED, IBV_WR_RDMA_WRITE};
use super::region::Region;
use super::structs::{ibv_send_wr, ibv_send_wr_rdma, ibv_sge};

/// One transfer between a local region and the peer's memory. The caller has checked the range.
pub(crate) struct RawTransfer {
    pub(crate) offset_bytes: usize,
    pub(crate) len_bytes: u32,
    pub(crate) remote_address: u64,
    pub(crate) remote_key: u32,
    pub(crate) id: u64,
    pub(crate) signalled: bool,
}

/// Write requests linked in the order they were pushed.
///
/// The arrays are held as raw pointers because the requests point into them and at each other: the code never
/// makes a reference to a whole array.
pub(crate) struct Requests {
    requests: NonNull<ibv_send_wr>,
    segments: NonNull<ibv_sge>,
    capacity: usize,
    len: usize,
    /// The regions of the requests, one entry for each stretch of requests in the same region.
    regions: Vec<Arc<Region>>,
}

// SAFETY: the arrays are owned by this value alone, and the pointers among them move with it.
unsafe impl Send for Requests {}
// SAFETY: nothing is changed through a shared reference.
unsafe impl Sync for Requests {}

impl Requests {
    pub(crate) fn with_capacity(capacity: usize) -> Requests {
        let capacity = capacity.max(1);
        let segments = vec![ibv_sge { addr: 0, length: 0, lkey: 0 }; capacity].into_boxed_slice();
        let requests = vec![blank_request(IBV_WR_RDMA_WRITE); capacity].into_boxed_slice();
        let segments = owned_pointer(Box::into_raw(segments));
        let requests = owned_pointer(Box::into_raw(requests));
        for index in 0..capacity {
            let last = index + 1 == capacity;
            let next = if last { ptr::null_mut() } else { requests.as_ptr().wrapping_add(index + 1) };
            let segment = segments.as_ptr().wrapping_add(index);
            // SAFETY: index is below the length of the array, which nothing else points into yet.
            let request = unsafe { &mut *requests.as_ptr().wrapping_add(index) };
            request.next = next;
            request.sg_list = segment;
            request.num_sge = 1;
        }
        Requests { requests, segments, capacity, len: 0, regions: Vec::new() }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Removes the requests and releases their regions.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.regions.clear();
    }

    /// Appends a write of a piece of `region`.
    pub(crate) fn push(&mut self, region: &Arc<Region>, transfer: &RawTransfer) {
        assert!(self.len < self.capacity, "a full list takes no more requests");
        // SAFETY: len is below the capacity, and no other reference into the segments exists.
        let segment = unsafe { &mut *self.segments.as_ptr().wrapping_add(self.len) };
        *segment = segment_of(region, transfer);
        // SAFETY: as above, for the requests.
        let request = unsafe { &mut *self.requests.as_ptr().wrapping_add(self.len) };
        request.wr_id = transfer.id;
        request.send_flags = if transfer.signalled { IBV_SEND_SIGNALED } else { 0 };
        request.wr.remote_addr = transfer.remote_address;
        request.wr.rkey = transfer.remote_key;
        self.len += 1;
        // Runs of pages come region by region, so this is one comparison per push and a clone per change of
        // region.
        if !self.regions.last().is_some_and(|last| Arc::ptr_eq(last, region)) {
            self.regions.push(Arc::clone(region));
        }
    }

    /// Requests a completion for the request pushed last.
    pub(crate) fn signal_last(&mut self, id: u64) {
        let Some(last) = self.len.checked_sub(1) else { return };
        // SAFETY: the index is below the capacity, and no other reference into the requests exists.
        let request = unsafe { &mut *self.requests.as_ptr().wrapping_add(last) };
        request.wr_id = id;
        request.send_flags = IBV_SEND_SIGNALED;
    }

    /// The regions that the requests read, in order, a region possibly more than once.
    pub(super) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Calls `post` with the head of the chain, ended after the last request pushed.
    pub(super) fn with_chain<R>(&mut self, post: impl FnOnce(*mut ibv_send_wr) -> R) -> R {
        let head = self.requests.as_ptr();
        let last = head.wrapping_add(self.len.max(1) - 1);
        // SAFETY: the index of the last request is below the capacity.
        let next = unsafe { (*last).next };
        // SAFETY: as above.
        unsafe { (*last).next = ptr::null_mut() };
        let result = post(head);
        // SAFETY: as above. The list is whole again for the next round.
        unsafe { (*last).next = next };
        result
    }

    /// How many requests lie before `request`, the first one that the provider refused.
    pub(super) fn index_of(&self, request: *const ibv_send_wr) -> usize {
        let distance = request.addr().saturating_sub(self.requests.as_ptr().addr());
        (distance / size_of::<ibv_send_wr>()).min(self.len)
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let requests = ptr::slice_from_raw_parts_mut(self.requests.as_ptr(), self.capacity);
        let segments = ptr::slice_from_raw_parts_mut(self.segments.as_ptr(), self.capacity);
        // SAFETY: this is the pointer and length that Box::into_raw returned, taken back once.
        drop(unsafe { Box::from_raw(requests) });
        // SAFETY: as above.
        drop(unsafe { Box::from_raw(segments) });
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Requests").field("len", &self.len).field("capacity", &self.capacity).finish()
    }
}

/// The local end of a transfer.
pub(super) fn segment_of(region: &Region, transfer: &RawTransfer) -> ibv_sge {
    // usize is at most 64 bits on every platform with verbs, and the range was checked against the region.
    let addr = region.address().wrapping_add(transfer.offset_bytes as u64);
    ibv_sge { addr, length: transfer.len_bytes, lkey: region.local_key() }
}

/// A request without data.
pub(super) fn blank_request(opcode: std::ffi::c_uint) -> ibv_send_wr {
    ibv_send_wr {
        wr_id: 0,
        next: ptr::null_mut(),
        sg_list: ptr::null_mut(),
        num_sge: 0,
        opcode,
        send_flags: 0,
        imm_data: 0,
        wr: ibv_send_wr_rdma { remote_addr: 0, rkey: 0, _atomic: [0; 5] },
        qp_type: 0,
        _bind_or_tso: [0; 6],
    }
}

/// The first element of a box; its ownership passes to the caller.
fn owned_pointer<T>(slice: *mut [T]) -> NonNull<T> {
    NonNull::new(slice.cast::<T>()).expect("Box::into_raw never returns null")
}

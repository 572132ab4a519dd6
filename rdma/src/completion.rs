//! Completion queues and what they report.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::completion_error::CompletionError;
use crate::device::{Device, DeviceLimits};
use crate::error::Error;
use crate::sys::completions::{Completions, POLL_MAX};
use crate::sys::constants::{IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_SUCCESS};
use crate::sys::os;
use crate::sys::structs::ibv_wc;

/// Reports completed requests of queue pairs. Several threads may poll it; each completion goes to one of
/// them.
///
/// Its capacity must cover every completion that can be outstanding: the signalled requests of all its queue
/// pairs, their posted receives, and on failure every request. A queue that overflows is lost, with its queue
/// pairs.
#[derive(Debug)]
pub struct CompletionQueue {
    completions: Arc<Completions>,
    /// Whether an event of an armed queue is still unread, because polling found the completion before a
    /// sleep.
    event_left: AtomicBool,
    device: Arc<Device>,
}

impl CompletionQueue {
    /// Creates one for at least `capacity` completions.
    ///
    /// # Errors
    /// [`Error::OverLimit`] when the device's queues are smaller, [`Error::Call`] when it has none left.
    pub fn new(device: &Arc<Device>, capacity: u32) -> Result<Arc<CompletionQueue>, Error> {
        DeviceLimits::check("completions in one queue", capacity, device.limits().completions)?;
        let entries = i32::try_from(capacity.max(1)).unwrap_or(i32::MAX);
        let completions = Completions::create(device.context(), entries)?;
        let event_left = AtomicBool::new(false);
        Ok(Arc::new(CompletionQueue { completions, event_left, device: Arc::clone(device) }))
    }

    /// How many completions fit: at least as many as the caller asked for.
    pub fn capacity(&self) -> usize {
        self.completions.capacity()
    }

    /// The device that owns the queue.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Moves available completions into `into` until it is full and returns their number. Never sleeps.
    ///
    /// # Errors
    /// [`Error::Call`] when the queue is broken. A failed request is not an error of this call: see
    /// [`Completion::result`].
    pub fn poll(&self, into: &mut [Completion]) -> Result<usize, Error> {
        let mut raw = [BLANK; POLL_MAX];
        let mut taken = 0;
        for batch in into.chunks_mut(POLL_MAX) {
            let got = self.completions.poll(&mut raw, batch.len())?;
            for (completion, raw) in batch.iter_mut().zip(&raw[..got]) {
                *completion = Completion::from_raw(raw);
            }
            taken += got;
            if got < batch.len() {
                break;
            }
        }
        Ok(taken)
    }

    /// Like [`poll`](Self::poll), but sleeps up to `timeout` for the first completion; returns 0 when none
    /// came.
    ///
    /// The queue is armed and then polled once more before the sleep, so a completion that arrives in between
    /// does not wait for the end of the sleep. A call that returns has left no completion behind that fits
    /// into `into`. A sleep that ends without a completion is repeated; all repetitions together last at most
    /// `timeout`.
    ///
    /// # Errors
    /// Those of [`poll`](Self::poll), and [`Error::Call`] when the completion channel cannot be read.
    pub fn wait(&self, into: &mut [Completion], timeout: Duration) -> Result<usize, Error> {
        if into.is_empty() {
            return Ok(0);
        }
        // Read only after a sleep in vain: where reading the clock is a system call, it costs as much as the
        // rest.
        let (mut slept, mut since) = (false, None);
        loop {
            match self.poll(into)? {
                0 => {}
                taken => return Ok(taken),
            }
            self.completions.arm()?;
            match self.poll(into)? {
                0 => {}
                taken => {
                    // At most one event stays unread, because the device's queue of events is unbounded.
                    if self.event_left.swap(true, Ordering::Relaxed) {
                        self.take_events()?;
                    }
                    return Ok(taken);
                }
            }
            let left = match slept {
                true => timeout.saturating_sub(since.get_or_insert_with(Instant::now).elapsed()),
                false => timeout,
            };
            let readable = os::wait_readable(self.completions.fd(), left);
            if !readable.map_err(|source| Error::Call { call: "poll", source })? {
                return Ok(0);
            }
            // An event left unread may have ended the sleep: then the loop sleeps again.
            if self.event_left.swap(false, Ordering::Relaxed) {
                self.take_events()?;
            } else {
                self.completions.take_event()?;
            }
            slept = true;
        }
    }

    fn take_events(&self) -> Result<(), Error> {
        while self.completions.take_event()? {}
        Ok(())
    }

    pub(crate) fn completions(&self) -> &Arc<Completions> {
        &self.completions
    }
}

/// A completed request, successful or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The `id` that the request was posted with.
    pub id: u64,
    /// The number of the local queue pair that the request was posted on.
    pub queue_pair: u32,
    /// What the request did, or why it failed. After the first error a queue pair executes nothing more, and
    /// its outstanding requests complete as [`Flushed`](crate::CompletionStatus::Flushed).
    pub result: Result<CompletionKind, CompletionError>,
}

impl Completion {
    /// A value to fill an array with before it is passed to [`CompletionQueue::poll`].
    pub const BLANK: Completion = Completion { id: 0, queue_pair: 0, result: Ok(CompletionKind::Write) };

    fn from_raw(raw: &ibv_wc) -> Completion {
        // For a failed request the library sets only wr_id, status, qp_num and vendor_err.
        let result = match raw.status {
            IBV_WC_SUCCESS => Ok(CompletionKind::from_raw(raw)),
            status => Err(CompletionError::from_raw(status, raw.vendor_err)),
        };
        Completion { id: raw.wr_id, queue_pair: raw.qp_num, result }
    }
}

/// What a request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompletionKind {
    /// The peer's device acknowledged a local write, with or without an immediate, and with it all writes
    /// posted before it on the same queue pair.
    Write,
    /// The data of a local read has arrived.
    Read {
        /// Its length.
        len_bytes: u32,
    },
    /// The peer wrote with an immediate. All its earlier writes on the same connection are in place.
    WriteImmediateReceived {
        /// The immediate.
        immediate: u32,
        /// The bytes that this write itself carried.
        len_bytes: u32,
    },
    /// Another opcode (`enum ibv_wc_opcode`).
    Other(u32),
}

impl CompletionKind {
    fn from_raw(raw: &ibv_wc) -> CompletionKind {
        match raw.opcode {
            IBV_WC_RDMA_WRITE => CompletionKind::Write,
            IBV_WC_RDMA_READ => CompletionKind::Read { len_bytes: raw.byte_len },
            IBV_WC_RECV_RDMA_WITH_IMM => CompletionKind::WriteImmediateReceived {
                immediate: u32::from_be(raw.imm_data),
                len_bytes: raw.byte_len,
            },
            other => CompletionKind::Other(other),
        }
    }
}

const BLANK: ibv_wc = ibv_wc {
    wr_id: 0,
    status: 0,
    opcode: 0,
    vendor_err: 0,
    byte_len: 0,
    imm_data: 0,
    qp_num: 0,
    src_qp: 0,
    wc_flags: 0,
    pkey_index: 0,
    slid: 0,
    sl: 0,
    dlid_path_bits: 0,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::completion_error::CompletionStatus;

    #[test]
    fn an_immediate_arrives_in_host_order() {
        let raw = ibv_wc {
            wr_id: 7,
            qp_num: 17,
            opcode: IBV_WC_RECV_RDMA_WITH_IMM,
            imm_data: 0x00c0_ffee_u32.to_be(),
            ..BLANK
        };
        let expected = CompletionKind::WriteImmediateReceived { immediate: 0x00c0_ffee, len_bytes: 0 };
        assert_eq!(Completion::from_raw(&raw), Completion { id: 7, queue_pair: 17, result: Ok(expected) });
    }

    #[test]
    fn a_failure_keeps_its_status_and_says_nothing_of_the_opcode() {
        let raw = ibv_wc { status: 10, vendor_err: 0x88, opcode: IBV_WC_RDMA_READ, ..BLANK };
        let error = Completion::from_raw(&raw).result.expect_err("status 10 is a failure");
        assert_eq!((error.status, error.vendor_code), (CompletionStatus::RemoteAccess, 0x88));
    }

    #[test]
    fn an_unknown_opcode_keeps_its_number() {
        let raw = ibv_wc { opcode: 99, ..BLANK };
        assert_eq!(Completion::from_raw(&raw).result, Ok(CompletionKind::Other(99)));
    }
}

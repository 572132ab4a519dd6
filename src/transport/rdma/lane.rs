use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use sterna_rdma::{Completion, CompletionQueue, PostError, QueuePair, Transfer, WriteList};

use super::slices::{SLICE_PAGES, Slices};
use super::{LIST_BYTES, LIST_WRITES, STALL_MAX, WINDOW_BYTES, WRITE_PAGES_MAX};
use crate::memory::PageRun;
use crate::transport::{Lane, TransportError};

/// A queue pair that writes pages.
pub(super) struct RdmaLane {
    index: usize,
    // Before the slices: a queue pair goes before the regions it writes from.
    queue_pair: QueuePair,
    completions: Arc<CompletionQueue>,
    slices: Arc<Slices>,
    /// The list being filled.
    list: WriteList,
    list_bytes: u64,
    /// What was posted since the last signal.
    unsignalled: Batch,
    /// What is on its way: a batch for each signal, in the order in which they will complete.
    in_flight: VecDeque<Batch>,
    in_flight_total: Batch,
    next_id: u64,
}

/// Requests and bytes that one completion accounts for.
#[derive(Clone, Copy, Debug, Default)]
struct Batch {
    id: u64,
    requests: u64,
    bytes: u64,
}

impl RdmaLane {
    pub(super) fn new(
        index: usize,
        queue_pair: QueuePair,
        completions: Arc<CompletionQueue>,
        slices: Arc<Slices>,
    ) -> Self {
        Self {
            index,
            queue_pair,
            completions,
            slices,
            list: WriteList::with_capacity(LIST_WRITES),
            list_bytes: 0,
            unsignalled: Batch::default(),
            in_flight: VecDeque::new(),
            in_flight_total: Batch::default(),
            next_id: 0,
        }
    }

    /// Adds one write to the list, and posts the list if that fills it.
    fn push(&mut self, part: PageRun) -> Result<(), TransportError> {
        let (slice, offset) = self.slices.of_page(part.region, part.first_page)?;
        let bytes = part.len_bytes();
        let signalled = self.list.len() + 1 == self.list.capacity() || self.list_bytes + bytes >= LIST_BYTES;
        let overflow = || TransportError::Disagreement(format!("{part:?} does not fit this machine"));
        self.list
            .push(Transfer {
                region: &slice.local,
                offset_bytes: usize::try_from(offset).map_err(|_| overflow())?,
                len_bytes: usize::try_from(bytes).map_err(|_| overflow())?,
                remote_address: slice.remote_address.wrapping_add(offset),
                remote_key: slice.remote_key,
                id: self.next_id,
                signalled,
            })
            .map_err(|error| self.not_posted(error.into()))?;
        self.list_bytes += bytes;
        if signalled { self.post(true) } else { Ok(()) }
    }

    /// Posts the list, once there is room for it.
    fn post(&mut self, signalled: bool) -> Result<(), TransportError> {
        let (requests, bytes) = (self.list.len() as u64, self.list_bytes);
        if requests == 0 {
            return Ok(());
        }
        // One request is kept free for the fence.
        self.make_room(requests + 1, bytes)?;
        self.list_bytes = 0;
        let posted = self.queue_pair.post_writes(&mut self.list);
        posted.map_err(|error| self.not_posted(error))?;
        self.posted(requests, bytes, signalled);
        Ok(())
    }

    fn posted(&mut self, requests: u64, bytes: u64, signalled: bool) {
        self.in_flight_total.requests += requests;
        self.in_flight_total.bytes += bytes;
        self.unsignalled.requests += requests;
        self.unsignalled.bytes += bytes;
        if signalled {
            self.in_flight.push_back(Batch { id: self.next_id, ..self.unsignalled });
            self.unsignalled = Batch::default();
            self.next_id += 1;
        }
    }

    /// Waits until so many more requests and bytes may be on their way.
    fn make_room(&mut self, requests: u64, bytes: u64) -> Result<(), TransportError> {
        let requests_max = u64::from(self.queue_pair.capacity().send_work_requests);
        while !self.in_flight.is_empty()
            && (self.in_flight_total.requests + requests > requests_max
                || self.in_flight_total.bytes + bytes > WINDOW_BYTES)
        {
            self.reap()?;
        }
        Ok(())
    }

    /// Takes completions, sleeping for the first if there is none yet.
    fn reap(&mut self) -> Result<(), TransportError> {
        let mut done = [Completion::BLANK; 16];
        let began = Instant::now();
        let count = self.completions.wait(&mut done, STALL_MAX)?;
        if count == 0 {
            return Err(TransportError::Stalled { lane: self.index, silence: began.elapsed() });
        }
        for completion in &done[..count] {
            // The first error is the cause; those after it only say that the queue pair is dead.
            completion.result.map_err(|error| TransportError::Write { lane: self.index, error })?;
            while let Some(batch) = self.in_flight.front().filter(|batch| batch.id <= completion.id) {
                self.in_flight_total.requests -= batch.requests;
                self.in_flight_total.bytes -= batch.bytes;
                self.in_flight.pop_front();
            }
        }
        Ok(())
    }

    fn not_posted(&self, error: PostError) -> TransportError {
        TransportError::Post { lane: self.index, error }
    }
}

impl Lane for RdmaLane {
    fn write(&mut self, mut run: PageRun) -> Result<(), TransportError> {
        while run.pages > 0 {
            let in_slice = SLICE_PAGES - run.first_page % SLICE_PAGES;
            let pages = run.pages.min(WRITE_PAGES_MAX).min(in_slice);
            self.push(PageRun { pages, ..run })?;
            run.first_page += pages;
            run.pages -= pages;
        }
        Ok(())
    }

    fn fence(&mut self, round: u32) -> Result<(), TransportError> {
        self.post(false)?;
        let posted = self.queue_pair.post_write_immediate(round, self.next_id);
        posted.map_err(|error| self.not_posted(error))?;
        self.posted(1, 0, true);
        while !self.in_flight.is_empty() {
            self.reap()?;
        }
        Ok(())
    }
}

impl fmt::Debug for RdmaLane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaLane").field("index", &self.index).finish_non_exhaustive()
    }
}

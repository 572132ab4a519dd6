use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sterna_rdma::{Completion, CompletionQueue, PostError, QueuePair, Transfer, WriteList};

use super::bounds::STALL_MAX;
use super::chunks::{Chunk, Chunks, contains};
use super::tuning::RdmaTuning;
use super::wire::ChunkRange;
use crate::control::PeerLiveness;
use crate::memory::{MemoryError, PAGE_BYTES, PageRun};
use crate::transport::error::TransportError;
use crate::transport::lane::Lane;

/// A queue pair that writes pages.
pub(super) struct RdmaLane {
    index: usize,
    // Before the chunks: a queue pair drops before the regions it writes from.
    queue_pair: QueuePair,
    completions: Arc<CompletionQueue>,
    chunks: Arc<Chunks>,
    tuning: RdmaTuning,
    liveness: PeerLiveness,
    /// The chunk of the latest write.
    current: Option<Current>,
    /// The chunks of the writes in flight.
    held: Vec<Held>,
    /// The list being filled. It is posted before the next write that does not fit, so after unsignalled
    /// posts a later write can always carry a signal.
    list: WriteList,
    list_bytes: u64,
    /// The requests posted since the last signal.
    unsignalled: Batch,
    /// The requests in flight: a batch for each signal, in the order of their completion.
    in_flight: VecDeque<Batch>,
    in_flight_total: Batch,
    next_id: u64,
    /// The time spent waiting for chunks, with no writes in flight.
    waited: Duration,
}

/// A chunk in use.
struct Current {
    range: ChunkRange,
    /// Holds the chunk; `None` for one that [stays whole](Chunks::whole).
    chunk: Option<Arc<Chunk>>,
}

/// A chunk that the registrar must not evict.
struct Held {
    range: ChunkRange,
    chunk: Arc<Chunk>,
    /// The signal after which no write from the chunk is in flight.
    last_id: u64,
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
        chunks: Arc<Chunks>,
        (tuning, liveness): (RdmaTuning, PeerLiveness),
    ) -> Self {
        Self {
            index,
            queue_pair,
            completions,
            chunks,
            tuning,
            liveness,
            current: None,
            held: Vec::new(),
            list: WriteList::with_capacity(usize::try_from(tuning.list_writes).unwrap_or(1)),
            list_bytes: 0,
            unsignalled: Batch::default(),
            in_flight: VecDeque::new(),
            in_flight_total: Batch::default(),
            next_id: 0,
            waited: Duration::ZERO,
        }
    }

    /// Adds one write, of pages of the current chunk, to the list; posts the list first if it is full.
    fn push(&mut self, part: PageRun) -> Result<(), TransportError> {
        let bytes = part.len_bytes();
        if self.list.is_full() || self.list_bytes + bytes > RdmaTuning::LIST_MAX_BYTES {
            self.post(false)?;
        }
        let Some(Current { chunk, range }) = &self.current else { return Ok(()) };
        let whole = || self.chunks.whole(range.region.into(), range.first_page).map(|(_, chunk)| chunk);
        let Some(chunk) = chunk.as_deref().or_else(whole) else { return Ok(()) };
        let offset = (part.first_page - range.first_page) * PAGE_BYTES;
        let overflow = || outside_of_ram(part);
        let pushed = self.list.push(Transfer {
            region: &chunk.local,
            offset_bytes: usize::try_from(offset).map_err(|_| overflow())?,
            len_bytes: usize::try_from(bytes).map_err(|_| overflow())?,
            remote_address: chunk.remote_address.wrapping_add(offset),
            remote_key: chunk.remote_key,
            id: 0,
            signalled: false,
        });
        pushed.map_err(|error| self.not_posted(error.into()))?;
        self.list_bytes += bytes;
        Ok(())
    }

    /// The range of the chunk that contains this page, which becomes the current one.
    fn hold(&mut self, region: usize, page: u64) -> Result<ChunkRange, TransportError> {
        match &self.current {
            Some(current) if contains(current.range, (region, page)) => Ok(current.range),
            _ => self.change_chunk(region, page),
        }
    }

    /// Makes another chunk the current one; waits for it if it is not registered.
    fn change_chunk(&mut self, region: usize, page: u64) -> Result<ChunkRange, TransportError> {
        self.chunks.reached(self.index, region, page);
        self.leave_current();
        if let Some((range, _)) = self.chunks.whole(region, page) {
            self.current = Some(Current { range, chunk: None });
            return Ok(range);
        }
        let again = self.held.iter().position(|held| contains(held.range, (region, page)));
        let again = again.map(|index| self.held.swap_remove(index)).map(|held| (held.range, held.chunk));
        let (range, chunk) = match again.or_else(|| self.chunks.acquire(region, page)) {
            Some(here) => here,
            None => {
                // With nothing held, to make room for the chunk. The writes in the list need not wait either.
                self.post(true)?;
                self.drain()?;
                let began = Instant::now();
                let here = self.chunks.await_part(region, page)?;
                self.waited += began.elapsed();
                here
            }
        };
        self.current = Some(Current { range, chunk: Some(chunk) });
        Ok(range)
    }

    fn leave_current(&mut self) {
        if let Some(Current { range, chunk: Some(chunk) }) = self.current.take() {
            // Whatever is written from it is covered by the next signal.
            self.held.push(Held { range, chunk, last_id: self.next_id });
        }
    }

    /// Posts the list, once there is room for it; with a signal if one is due, or if `signalled` asks for it.
    fn post(&mut self, signalled: bool) -> Result<(), TransportError> {
        let (requests, bytes) = (self.list.len() as u64, self.list_bytes);
        if requests == 0 {
            return Ok(());
        }
        // One request is kept free for the fence.
        self.make_room(requests + 1, bytes)?;
        let signalled = signalled
            || self.unsignalled.requests + requests >= self.tuning.signal_writes.into()
            || self.unsignalled.bytes + bytes >= self.tuning.window_bytes / 2;
        if signalled {
            self.list.signal_last(self.next_id);
        }
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

    /// Waits until this many more requests and bytes may be in flight.
    fn make_room(&mut self, requests: u64, bytes: u64) -> Result<(), TransportError> {
        let requests_max = u64::from(self.tuning.window_writes);
        while !self.in_flight.is_empty()
            && (self.in_flight_total.requests + requests > requests_max
                || self.in_flight_total.bytes + bytes > self.tuning.window_bytes)
        {
            self.reap()?;
        }
        Ok(())
    }

    /// Waits for all writes in flight, and then holds no chunk.
    fn drain(&mut self) -> Result<(), TransportError> {
        while !self.in_flight.is_empty() {
            self.reap()?;
        }
        self.leave_current();
        self.let_go(u64::MAX);
        Ok(())
    }

    /// Takes completions; sleeps until the first.
    fn reap(&mut self) -> Result<(), TransportError> {
        let mut done = [Completion::BLANK; 16];
        // Set at the end of the first nap: mostly no nap is needed, and then the clock is not read.
        let mut silent_since = None;
        let count = loop {
            match self.completions.wait(&mut done, NAP_MAX)? {
                0 => {
                    let silence = silent_since.get_or_insert_with(Instant::now).elapsed();
                    if silence >= STALL_MAX {
                        return Err(TransportError::Stalled { lane: self.index, silence });
                    }
                    self.liveness.check_not_interrupted()?;
                }
                count => break count,
            }
        };
        for completion in &done[..count] {
            // The first error is the cause; later ones only show that the queue pair is dead.
            completion.result.map_err(|error| TransportError::Write { lane: self.index, error })?;
            while let Some(batch) = self.in_flight.front().filter(|batch| batch.id <= completion.id) {
                self.in_flight_total.requests -= batch.requests;
                self.in_flight_total.bytes -= batch.bytes;
                self.in_flight.pop_front();
            }
            self.let_go(completion.id);
        }
        Ok(())
    }

    /// Releases the chunks without writes in flight once this signal has completed.
    fn let_go(&mut self, id: u64) {
        let before = self.held.len();
        self.held.retain(|held| {
            let done = held.last_id <= id;
            if done {
                self.queue_pair.release(&held.chunk.local);
            }
            !done
        });
        if self.held.len() < before {
            self.chunks.released();
        }
    }

    fn not_posted(&self, error: PostError) -> TransportError {
        TransportError::Post { lane: self.index, error }
    }
}

impl Lane for RdmaLane {
    fn write(&mut self, mut run: PageRun) -> Result<(), TransportError> {
        let pages_max = self.tuning.write_max_bytes / PAGE_BYTES;
        while run.pages > 0 {
            if !self.chunks.has(run.region, run.first_page) {
                return Err(outside_of_ram(run));
            }
            let range = self.hold(run.region, run.first_page)?;
            let in_slice = range.first_page + range.pages - run.first_page;
            let pages = run.pages.min(pages_max).min(in_slice);
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
        self.drain()?;
        self.chunks.reached_end(self.index);
        Ok(())
    }

    fn waited(&self) -> Duration {
        self.waited
    }
}

/// Poll interval for cancellation.
const NAP_MAX: Duration = Duration::from_millis(50);

fn outside_of_ram(PageRun { region, first_page, pages }: PageRun) -> TransportError {
    MemoryError::OutOfRange { region, first_page, pages }.into()
}

impl fmt::Debug for RdmaLane {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RdmaLane").field("index", &self.index).finish_non_exhaustive()
    }
}

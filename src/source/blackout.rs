//! The source's work on a paused guest's bitmap, alone: for `sterna-bench blackout`, over lanes that send
//! nothing.

use std::hint::black_box;
use std::time::Duration;

use rayon::ThreadPool;

use super::error::MigrationFailure;
use crate::dirty::{DirtyBitmap, DirtyError, DirtyLog, Stripes};
use crate::memory::{GuestRam, PageRun};
use crate::session::{Pass, PrecopyPass, RateLimiter, SendGate};
use crate::transport::rdma::NullRegions;
use crate::transport::{Lane, TransportError};
use crate::verify::{SourceDigests, Verify};

/// The steps of a switch with a cost that depends on the guest's RAM, one by one.
#[derive(Debug)]
pub struct Blackout {
    ram: GuestRam,
    pool: ThreadPool,
    stripes: Stripes,
    dirty: DirtyBitmap,
    source_digests: SourceDigests,
    regions: NullRegions,
    null_lanes: Vec<Box<dyn Lane>>,
    chunk_lanes: Vec<Box<dyn Lane>>,
}

impl Blackout {
    /// For a guest with this RAM, no page of which is read, and with this many lanes.
    ///
    /// # Errors
    /// [`MigrationFailure::System`] if no thread can start.
    pub fn new(ram: GuestRam, lanes: u8, verify: Verify) -> Result<Self, MigrationFailure> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(lanes.into())
            .build()
            .map_err(|error| MigrationFailure::System { what: "threads", error: error.to_string() })?;
        let layout = ram.layout();
        let regions = NullRegions::new(layout.clone(), lanes);
        Ok(Self {
            pool,
            stripes: Stripes::new(lanes.into()),
            dirty: DirtyBitmap::new(&layout),
            source_digests: SourceDigests::new(&layout, verify),
            null_lanes: (0..lanes).map(|_| Box::new(NullLane) as Box<dyn Lane>).collect(),
            chunk_lanes: (0..lanes).map(|index| regions.lane(index.into())).collect(),
            regions,
            ram,
        })
    }

    /// Registers every chunk of RAM, as after the first round of a guest that uses all of its RAM, and clears
    /// the dirty pages.
    pub fn register_all(&mut self) -> usize {
        self.dirty.by(&self.pool, DirtyBitmap::fill);
        let chunks = self.regions.register(&self.dirty);
        self.clear();
        chunks
    }

    /// The dirty pages.
    pub fn dirty(&mut self) -> &mut DirtyBitmap {
        &mut self.dirty
    }

    /// Clears the dirty pages, as a round does before it harvests.
    pub fn clear(&mut self) {
        self.dirty.by(&self.pool, DirtyBitmap::clear);
    }

    /// Harvests, as after the pause.
    ///
    /// # Errors
    /// Those of the log.
    pub fn harvest(&mut self, log: &dyn DirtyLog) -> Result<u64, DirtyError> {
        self.dirty.by(&self.pool, |dirty| dirty.harvest(log))
    }

    /// Marks every block of RAM as compared, as after a pass of hashing.
    pub fn settle(&mut self) {
        let all: Vec<_> = (0..self.source_digests.len()).collect();
        self.source_digests.settle(&all, Duration::from_millis(1));
    }

    /// Records the harvest for comparing.
    pub fn note(&mut self) {
        self.source_digests.harvested(&self.dirty);
    }

    /// Plans the registration that a round needs; returns how many chunks are missing.
    #[must_use]
    pub fn plan(&self) -> usize {
        self.regions.register(&self.dirty)
    }

    /// Finds the dirty pages for lanes that do nothing with them, or only look up the chunk of each page;
    /// returns their number.
    ///
    /// # Errors
    /// None is expected.
    pub fn send(&mut self, look_up_slices: bool) -> Result<u64, MigrationFailure> {
        let rounds = PrecopyPass {
            ram: &self.ram,
            log: None,
            stripes: &self.stripes,
            pool: &self.pool,
            gate: SendGate { pace: &RateLimiter::default(), check: &|| Ok(()), progress: None },
            registration: None,
        };
        let lanes = if look_up_slices { &mut self.chunk_lanes } else { &mut self.null_lanes };
        Ok(rounds.send(Pass { number: 2, skips_zeros: false }, &self.dirty, lanes)?.pages)
    }
}

#[derive(Debug)]
struct NullLane;

impl Lane for NullLane {
    fn write(&mut self, run: PageRun) -> Result<(), TransportError> {
        black_box(run);
        Ok(())
    }

    fn fence(&mut self, _round: u32) -> Result<(), TransportError> {
        Ok(())
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::dirty::{SoftwareBitmap, SoftwareLog};

    #[test]
    fn it_finds_what_is_dirty_and_plans_only_what_is_not_registered() {
        const PAGES: u64 = 20_000;
        let len = usize::try_from(PAGES * 4096).unwrap();
        let memory: GuestMemoryMmap<SoftwareBitmap> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let mut blackout = Blackout::new(ram, 2, Verify::Final).unwrap();
        blackout.dirty().regions_mut()[0].mark(7..8);
        assert_eq!((blackout.plan(), blackout.plan()), (1, 0));
        assert!(blackout.register_all() > 1);
        assert_eq!(blackout.harvest(&SoftwareLog::new(&memory)).unwrap(), 0);
        blackout.dirty().regions_mut()[0].mark(7..PAGES - 1);
        blackout.settle();
        blackout.note();
        for look_up_slices in [false, true] {
            assert_eq!(blackout.send(look_up_slices).unwrap(), PAGES - 8);
        }
        assert_eq!(blackout.plan(), 0);
    }
}

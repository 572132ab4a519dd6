use thiserror::Error;

use crate::digest::{self, Digest};
use crate::memory::{GuestRam, MemoryError, PageRun};
use crate::wire::BlockDigest;

/// The source's digests at the destination. It holds nothing until the first digest arrives: without
/// comparing, a switch does not walk over all blocks, and a large guest takes no memory.
#[derive(Debug)]
pub(crate) struct DestinationDigests {
    ram: GuestRam,
    blocks: Vec<PageRun>,
    theirs: Vec<Option<Digest>>,
    /// How many blocks have a digest.
    known: usize,
    /// Whether the block's latest digest compared equal.
    equal: Vec<bool>,
}

/// Errors in the digests, or differences in the memory.
#[derive(Debug, Error)]
pub(crate) enum CheckError {
    #[error("digests of blocks that do not exist")]
    NoSuchBlock,
    #[error("an incomplete list of digests")]
    Incomplete,
    #[error("{blocks} blocks differ")]
    Differs { blocks: usize, of: usize, first: PageRun },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl DestinationDigests {
    pub(crate) fn new(ram: &GuestRam) -> Self {
        Self { ram: ram.clone(), blocks: Vec::new(), theirs: Vec::new(), known: 0, equal: Vec::new() }
    }

    /// Stores digests, to be compared at the end. The last one of a block counts.
    pub(crate) fn note(&mut self, digests: &[BlockDigest]) -> Result<(), CheckError> {
        if self.blocks.is_empty() {
            self.blocks = digest::blocks(&self.ram.layout());
            (self.theirs, self.equal) = (vec![None; self.blocks.len()], vec![false; self.blocks.len()]);
        }
        for BlockDigest { block, digest } in digests {
            let index = *block as usize;
            let before = self.theirs.get_mut(index).ok_or(CheckError::NoSuchBlock)?.replace(*digest);
            self.known += usize::from(before.is_none());
            self.equal[index] = false;
        }
        Ok(())
    }

    /// Compares stored digests with RAM as it is now; returns how many are equal. A difference is no error:
    /// the pages that resolve it may be on their way.
    pub(crate) fn compare_now(&mut self, digests: &[BlockDigest]) -> Result<u32, CheckError> {
        let indices: Vec<_> = digests.iter().map(|digest| digest.block as usize).collect();
        self.compare(&indices)?;
        let equal = indices.iter().filter(|&&index| self.equal[index]).count();
        Ok(u32::try_from(equal).unwrap_or(u32::MAX))
    }

    /// Compares all blocks that were not found equal yet; returns how many pages the digests cover. Call it
    /// when nothing can write to RAM any more. `blocks` is how many digests the source claims to have sent:
    /// all or none.
    pub(crate) fn conclude(&mut self, blocks: u64) -> Result<u64, CheckError> {
        if blocks == 0 && self.known == 0 {
            return Ok(0);
        }
        if blocks != self.blocks.len() as u64 || self.known < self.blocks.len() {
            return Err(CheckError::Incomplete);
        }
        let rest = |equal: &[bool]| (0..equal.len()).filter(|&index| !equal[index]).collect::<Vec<_>>();
        self.compare(&rest(&self.equal))?;
        let differing = rest(&self.equal);
        match differing.first() {
            None => Ok(self.ram.layout().total_pages()),
            Some(&first) => Err(CheckError::Differs {
                blocks: differing.len(),
                of: self.blocks.len(),
                first: self.blocks[first],
            }),
        }
    }

    fn compare(&mut self, indices: &[usize]) -> Result<(), CheckError> {
        let blocks: Vec<_> = indices.iter().map(|&index| self.blocks[index]).collect();
        for (&index, ours) in indices.iter().zip(digest::digests(&self.ram, &blocks)?) {
            self.equal[index] = self.theirs[index] == Some(ours);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::dirty::{DirtyBitmap, DirtyLog, SoftwareBitmap, SoftwareLog};
    use crate::verify::{SourceDigests, Verify};

    /// A region of two full blocks and a short one, and a region of a single page.
    const PAGES: [u64; 2] = [1100, 1];

    fn memory() -> GuestMemoryMmap<SoftwareBitmap> {
        let region = |index: usize| {
            (GuestAddress((index as u64) << 32), usize::try_from(PAGES[index] * 4096).unwrap())
        };
        GuestMemoryMmap::from_ranges(&[region(0), region(1)]).unwrap()
    }

    /// The address of a page, counted through both regions.
    fn address(page: u64) -> GuestAddress {
        let page = page % (PAGES[0] + PAGES[1]);
        if page < PAGES[0] { GuestAddress(page * 4096) } else { GuestAddress(1 << 32) }
    }

    /// Both ends of a migration, reduced to what these tests need.
    struct Ends {
        source: GuestMemoryMmap<SoftwareBitmap>,
        destination: GuestMemoryMmap<SoftwareBitmap>,
        ram: GuestRam,
        log: Box<dyn DirtyLog>,
        dirty: DirtyBitmap,
        source_digests: SourceDigests,
        checks: DestinationDigests,
        writes: u64,
    }

    impl Ends {
        fn new() -> Self {
            let (source, destination) = (memory(), memory());
            let ram = GuestRam::from_vm_memory(&source).unwrap();
            let mut dirty = DirtyBitmap::new(&ram.layout());
            dirty.fill();
            let (source_digests, log) =
                (SourceDigests::new(&ram.layout(), Verify::Final), Box::new(SoftwareLog::new(&source)));
            let checks = DestinationDigests::new(&GuestRam::from_vm_memory(&destination).unwrap());
            Self { source, destination, ram, log, dirty, source_digests, checks, writes: 0 }
        }

        fn write(&mut self, page: u64) {
            self.writes += 1;
            self.source.write_obj(self.writes, address(page)).unwrap();
        }

        /// Makes the log forget what was written since the last harvest.
        fn forget(&mut self) {
            DirtyBitmap::new(&self.ram.layout()).harvest(&*self.log).unwrap();
        }

        fn send(&mut self) {
            for (region, dirty) in self.dirty.regions().iter().enumerate() {
                let is_dirty =
                    |page: &u64| dirty.words()[usize::try_from(page / 64).unwrap()] & (1 << (page % 64)) != 0;
                for page in (0..PAGES[region]).filter(is_dirty) {
                    let at = GuestAddress(((region as u64) << 32) + page * 4096);
                    let value: u64 = self.source.read_obj(at).unwrap();
                    self.destination.write_obj(value, at).unwrap();
                }
            }
        }

        fn round(&mut self) {
            self.send();
            self.dirty.clear();
            self.dirty.harvest(&*self.log).unwrap();
            self.source_digests.harvested(&self.dirty);
        }

        fn pass(&mut self) -> u32 {
            let clean = self.source_digests.worth_hashing(&self.dirty);
            let digests = self.source_digests.hash(&self.ram, &clean).unwrap();
            self.checks.note(&digests).unwrap();
            self.source_digests.settle(&clean, Default::default());
            self.checks.compare_now(&digests).unwrap()
        }

        fn switch(&mut self) -> Result<u64, CheckError> {
            self.dirty.harvest(&*self.log).unwrap();
            self.source_digests.harvested(&self.dirty);
            self.send();
            let digests = self.source_digests.hash(&self.ram, &self.source_digests.unsettled()).unwrap();
            self.checks.note(&digests).unwrap();
            self.checks.conclude(self.source_digests.len() as u64)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64),
        Round,
        Pass,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let write = (0..PAGES[0] + PAGES[1]).prop_map(Step::Write);
        prop::collection::vec(prop_oneof![4 => write, 2 => Just(Step::Round), 1 => Just(Step::Pass)], 0..24)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn whatever_is_written_when_each_block_is_compared_after_the_last_write_to_it(steps in steps()) {
            let mut ends = Ends::new();
            for step in steps {
                match step {
                    Step::Write(page) => ends.write(page),
                    Step::Round => ends.round(),
                    Step::Pass => {
                        ends.pass();
                    }
                }
            }
            prop_assert_eq!(ends.switch().unwrap(), PAGES[0] + PAGES[1]);
            // Each digest that the destination accepted is that of the block as it is at the end.
            for (block, theirs) in ends.checks.blocks.iter().zip(&ends.checks.theirs) {
                prop_assert_eq!(&digest::digests(&ends.ram, &[*block]).unwrap()[0], theirs.as_ref().unwrap());
            }
        }

        #[test]
        fn a_page_that_the_log_forgot_is_found(page in 0..PAGES[0] + PAGES[1], passes in 0..3u32, later in steps()) {
            let mut ends = Ends::new();
            ends.round();
            ends.write(page);
            ends.forget();
            for _ in 0..passes {
                ends.pass();
            }
            for step in later {
                match step {
                    // Writing to the page again would repair it.
                    Step::Write(other) if address(other) != address(page) => ends.write(other),
                    Step::Round => ends.round(),
                    _ => {}
                }
            }
            let found = matches!(ends.switch(), Err(CheckError::Differs { blocks: 1, of: 4, .. }));
            prop_assert!(found);
        }
    }

    #[test]
    fn what_stays_clean_is_hashed_once_while_the_guest_runs() {
        let mut ends = Ends::new();
        assert_eq!(ends.pass(), 0, "all is dirty yet");
        let mut ends = Ends::new();
        ends.round();
        ends.write(3);
        ends.round();
        assert_eq!(ends.pass(), 3, "all but the first block");
        assert!(ends.source_digests.worth_hashing(&ends.dirty).is_empty());
        ends.write(PAGES[0]);
        ends.round();
        assert_eq!(ends.source_digests.unsettled(), [0, 3]);
        assert_eq!(ends.source_digests.worth_hashing(&ends.dirty), [0], "it is half of what is left");
        assert_eq!(ends.switch().unwrap(), PAGES[0] + PAGES[1]);
    }

    #[test]
    fn a_list_that_is_incomplete_or_of_something_else_is_refused() {
        let mut ends = Ends::new();
        assert_eq!(ends.checks.conclude(0).unwrap(), 0, "nothing was to be compared");
        assert!(matches!(ends.checks.conclude(4), Err(CheckError::Incomplete)));
        assert!(ends.checks.blocks.is_empty(), "nothing is kept for blocks that are not compared");
        let digests = ends.source_digests.hash(&ends.ram, &[0, 1, 2]).unwrap();
        ends.checks.note(&digests).unwrap();
        for blocks in [0, 3, 4, u64::MAX] {
            assert!(matches!(ends.checks.conclude(blocks), Err(CheckError::Incomplete)));
        }
        let beyond = BlockDigest { block: 4, digest: [0; 32] };
        assert!(matches!(ends.checks.note(&[beyond]), Err(CheckError::NoSuchBlock)));
        let last = ends.source_digests.hash(&ends.ram, &[3]).unwrap();
        ends.checks.note(&last).unwrap();
        assert_eq!(ends.checks.conclude(4).unwrap(), PAGES[0] + PAGES[1]);
    }
}

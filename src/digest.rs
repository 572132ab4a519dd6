//! Digests of guest RAM, by which the two ends compare it.
//!
//! RAM is hashed in blocks of [`BLOCK_PAGES`] with BLAKE3. Pages that were never touched count as zeros and
//! stay untouched, so that comparing a large, mostly empty guest costs neither time nor memory. Digests are
//! meaningful only for a paused guest, or for blocks that are not written to meanwhile.

use rayon::prelude::*;

use crate::memory::{GuestRam, MemoryError, PAGE_LEN, PageRun, RamLayout, TouchedSearch};

/// Pages in a block: 2 MiB.
pub(crate) const BLOCK_PAGES: u64 = 512;

/// The digest of a block.
pub(crate) type Digest = [u8; 32];

const ZERO_PAGE: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// The blocks of RAM, in order; the last of a region may be short.
pub(crate) fn blocks(layout: &RamLayout) -> Vec<PageRun> {
    let whole = |(region, layout): (usize, &crate::memory::RegionLayout)| {
        PageRun { region, first_page: 0, pages: layout.pages() }.split(BLOCK_PAGES)
    };
    layout.regions.iter().enumerate().flat_map(whole).collect()
}

/// The digests of some blocks, computed by all workers of the current pool.
pub(crate) fn digests(ram: &GuestRam, blocks: &[PageRun]) -> Result<Vec<Digest>, MemoryError> {
    let zeros = digest_of_zeros(BLOCK_PAGES);
    blocks.par_iter().map(|&block| digest(ram, block, &zeros)).collect()
}

fn digest(ram: &GuestRam, block: PageRun, zeros: &Digest) -> Result<Digest, MemoryError> {
    let outside =
        MemoryError::OutOfRange { region: block.region, first_page: block.first_page, pages: block.pages };
    let touched = TouchedSearch::default().touched(ram.regions().get(block.region).ok_or(outside)?, block)?;
    if touched.is_empty() && block.pages == BLOCK_PAGES {
        return Ok(*zeros);
    }
    let mut hasher = blake3::Hasher::new();
    let mut page = [0; PAGE_LEN];
    let mut next = block.first_page;
    for run in touched {
        update_zeros(&mut hasher, run.first_page - next);
        for bytes in ram.slice(run)?.pages() {
            bytes.copy_to(&mut page);
            hasher.update(&page);
        }
        next = run.first_page + run.pages;
    }
    update_zeros(&mut hasher, block.first_page + block.pages - next);
    Ok(hasher.finalize().into())
}

/// The digest of a block of zeros.
pub(crate) fn digest_of_zeros(pages: u64) -> Digest {
    let mut hasher = blake3::Hasher::new();
    update_zeros(&mut hasher, pages);
    hasher.finalize().into()
}

fn update_zeros(hasher: &mut blake3::Hasher, pages: u64) {
    for _ in 0..pages {
        hasher.update(&ZERO_PAGE);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;

    fn memory(file: Option<File>) -> GuestMemoryMmap<()> {
        const LEN: usize = 5 << 20;
        let file =
            file.inspect(|file| file.set_len(LEN as u64).unwrap()).map(|file| FileOffset::new(file, 0));
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), LEN, file)]).unwrap()
    }

    #[test]
    fn holes_and_written_zeros_are_the_same_and_one_bit_is_not() {
        let (sparse, anonymous) = (memory(Some(tempfile::tempfile().unwrap())), memory(None));
        let of = |memory: &GuestMemoryMmap<()>| {
            let ram = GuestRam::from_vm_memory(memory).unwrap();
            digests(&ram, &blocks(&ram.layout())).unwrap()
        };
        for memory in [&sparse, &anonymous] {
            memory.write_obj(7u64, GuestAddress((2 << 20) + 40960)).unwrap();
        }
        sparse.write_obj(0u64, GuestAddress(4096)).unwrap();
        assert_eq!(of(&sparse).len(), 3);
        assert_eq!(of(&sparse), of(&anonymous));
        sparse.write_obj(1u8, GuestAddress((5 << 20) - 1)).unwrap();
        let (sparse, anonymous) = (of(&sparse), of(&anonymous));
        assert_eq!(sparse[..2], anonymous[..2]);
        assert_ne!(sparse[2], anonymous[2]);
    }
}

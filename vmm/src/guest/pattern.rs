//! The content of the guest's pages, and its check.
//!
//! A page is eight blocks of 512 bytes, and each generation writes one word into each block. Word and
//! position depend on the page's number and on the generation, so a page that is lost, old, torn or in the
//! wrong place cannot pass for a right one:
//!
//! ```text
//!   word(page, generation, block) = page × PAGE_FACTOR + generation × GENERATION_FACTOR + block × WORD_STEP
//!   slot(page, generation)        = (page + generation) mod 64, in words from the beginning of the block
//! ```
//!
//! Blocks are written in ascending order. The slot advances by one with each generation, so the other words
//! of a block are those of the 63 generations before, and every one of the 512 words of a page has one right
//! value.

use crate::ram::PAGE_BYTES;

/// Odd numbers without structure, so that different pages, generations and blocks have different words.
pub(crate) const PAGE_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const GENERATION_FACTOR: u64 = 0xc2b2_ae3d_27d4_eb4f;
pub(crate) const WORD_STEP: u64 = 0x1656_67b1_9e37_79f9;

pub(crate) const BLOCKS: u64 = 8;
pub(crate) const BLOCK_BYTES: u64 = PAGE_BYTES / BLOCKS;
pub(crate) const BLOCK_WORDS: u64 = BLOCK_BYTES / 8;
pub(crate) const PAGE_WORDS: usize = 512;

/// The words of a page.
pub(crate) type PageContent = [u64; PAGE_WORDS];

/// The word that a generation writes into a block. Generation 0 is untouched RAM.
pub(crate) fn word(page: u64, generation: u64, block: u64) -> u64 {
    if generation == 0 {
        return 0;
    }
    page.wrapping_mul(PAGE_FACTOR)
        .wrapping_add(generation.wrapping_mul(GENERATION_FACTOR))
        .wrapping_add(block.wrapping_mul(WORD_STEP))
}

/// The position in a page of a generation's word of a block, in bytes.
pub(crate) fn offset_bytes(page: u64, generation: u64, block: u64) -> u64 {
    block * BLOCK_BYTES + (page.wrapping_add(generation) % BLOCK_WORDS) * 8
}

/// Whether a page has the right content after a complete `generation`.
pub(crate) fn is_whole(content: &PageContent, page: u64, generation: u64) -> bool {
    (0..BLOCKS).all(|block| block_is_at(content, page, generation, block))
}

/// Whether a page has the right content during `generation`: its first blocks have that generation, the rest
/// the one before.
pub(crate) fn is_part_way(content: &PageContent, page: u64, generation: u64) -> bool {
    let written =
        (0..BLOCKS).take_while(|&block| block_is_at(content, page, generation, block)).count() as u64;
    (written..BLOCKS).all(|block| block_is_at(content, page, generation - 1, block))
}

/// Whether all 64 words of a block are those of `generation` and of the generations before it.
fn block_is_at(content: &PageContent, page: u64, generation: u64, block: u64) -> bool {
    let newest = page.wrapping_add(generation);
    (0..BLOCK_WORDS).all(|slot| {
        let age = newest.wrapping_sub(slot) % BLOCK_WORDS;
        let position = usize::try_from(block * BLOCK_WORDS + slot).unwrap_or(PAGE_WORDS);
        content.get(position) == Some(&word(page, generation.saturating_sub(age), block))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(content: &mut PageContent, page: u64, generation: u64, blocks: u64) {
        for block in 0..blocks {
            content[usize::try_from(offset_bytes(page, generation, block) / 8).unwrap()] =
                word(page, generation, block);
        }
    }

    fn after(page: u64, generation: u64) -> PageContent {
        let mut content = [0; PAGE_WORDS];
        (1..=generation).for_each(|generation| write(&mut content, page, generation, BLOCKS));
        content
    }

    #[test]
    fn a_written_page_is_right_for_its_generation_only() {
        for generation in [0, 1, 2, 63, 64, 65, 200] {
            let content = after(7, generation);
            assert!(is_whole(&content, 7, generation));
            assert!(!is_whole(&content, 7, generation + 1));
            if generation > 0 {
                assert!(!is_whole(&content, 7, generation - 1));
                assert!(!is_whole(&content, 8, generation), "another page's content");
            }
        }
    }

    #[test]
    fn every_single_word_counts() {
        let right = after(0x1234, 70);
        for index in 0..PAGE_WORDS {
            let mut content = right;
            content[index] ^= 1 << (index % 64);
            assert!(!is_whole(&content, 0x1234, 70));
            assert!(!is_part_way(&content, 0x1234, 70));
        }
    }

    #[test]
    fn a_page_part_way_has_its_blocks_in_order() {
        for blocks in 0..=BLOCKS {
            let mut content = after(5, 9);
            write(&mut content, 5, 10, blocks);
            assert!(is_part_way(&content, 5, 10));
        }
        let mut torn = after(5, 9);
        write(&mut torn, 5, 10, BLOCKS);
        let old = after(5, 9);
        torn[..64].copy_from_slice(&old[..64]);
        assert!(!is_part_way(&torn, 5, 10), "block 0 is older than block 1");
    }
}

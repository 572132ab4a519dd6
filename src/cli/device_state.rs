//! The state of a simulated device, of any length: with it the built-in guest behaves like one with a frame
//! buffer or a virtual GPU. Its bytes do not compress, and are checked when they are loaded.

use std::io::{self, BufRead, ErrorKind, Write};

/// How many words are generated at once: 64 KiB, which fit a processor's cache.
const BLOCK_WORDS: usize = 8 << 10;
const WORD_BYTES: usize = size_of::<u64>();

/// Writes `len_bytes` bytes.
pub(super) fn write(len_bytes: u64, to: &mut dyn Write) -> io::Result<()> {
    each_block(len_bytes, |block| to.write_all(block))
}

/// Reads `len_bytes` bytes, and fails if they differ from those of `write`.
pub(super) fn check(len_bytes: u64, from: &mut dyn BufRead) -> io::Result<()> {
    each_block(len_bytes, |mut block| {
        while !block.is_empty() {
            let arrived = from.fill_buf()?;
            let count = arrived.len().min(block.len());
            let (expected, rest) = block.split_at(count);
            if count == 0 || arrived[..count] != *expected {
                let what = "the state of the device is not what was saved";
                return Err(io::Error::new(ErrorKind::InvalidData, what));
            }
            from.consume(count);
            block = rest;
        }
        Ok(())
    })
}

fn each_block(len_bytes: u64, mut next: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let words: Vec<u64> = (1..).map(scrambled).take(BLOCK_WORDS).collect();
    let mut block = vec![0; BLOCK_WORDS * WORD_BYTES];
    let (mut left, mut number) = (len_bytes, 0);
    while left > 0 {
        let other = scrambled(!number);
        for (bytes, word) in block.chunks_exact_mut(WORD_BYTES).zip(&words) {
            bytes.copy_from_slice(&(word ^ other).to_le_bytes());
        }
        let count = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        next(&block[..count])?;
        (left, number) = (left - count as u64, number + 1);
    }
    Ok(())
}

/// The finalizer of SplitMix64.
fn scrambled(number: u64) -> u64 {
    let number = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_changes_or_is_missing_is_noticed() {
        const LEN: u64 = (BLOCK_WORDS * WORD_BYTES) as u64 * 2 + 5;
        let mut state = Vec::new();
        write(LEN, &mut state).unwrap();
        assert_eq!(state.len() as u64, LEN);
        check(LEN, &mut &state[..]).unwrap();
        assert!(check(LEN, &mut &state[1..]).is_err(), "one is missing");
        for at in [0, state.len() / 2, state.len() - 1] {
            let mut other = state.clone();
            other[at] ^= 1;
            assert!(check(LEN, &mut &other[..]).is_err(), "byte {at} is another");
        }
    }
}

//! The table of blocks with which RAM starts.

use std::collections::HashMap;

use crate::names::SharedBlock;
use crate::page::PAGE_BYTES;
use crate::stream::cursor::Cursor;
use crate::stream::encode;
use crate::stream::error::StreamFault;
use crate::stream::unshared::Unshared;

/// A machine has a few dozen, and one more for each memory device.
const BLOCKS_MAX: usize = 4096;

/// A block of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Block {
    /// Its index among the shared blocks.
    Shared(usize),
    /// Its index among the others.
    Unshared(usize),
}

/// All blocks, by name.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    by_name: HashMap<Box<str>, Block>,
}

impl Blocks {
    pub(crate) fn block(&self, name: &str) -> Option<Block> {
        self.by_name.get(name).copied()
    }

    /// Reads the table: names and lengths, until these have the sum `total`. Adds it to the blob's head.
    pub(crate) fn read(
        cursor: &mut Cursor<'_>,
        total: u64,
        shared: &[SharedBlock],
        unshared: &mut Unshared,
        head: &mut Vec<u8>,
    ) -> Result<Self, StreamFault> {
        let mut this = Self::default();
        let mut rest = total;
        while rest > 0 {
            cursor.begin_item();
            if this.by_name.len() == BLOCKS_MAX {
                return Err(StreamFault::TooManyBlocks(BLOCKS_MAX));
            }
            let name = name(cursor.counted()?)?.to_owned();
            let len_bytes = cursor.u64()?;
            head.extend(encode::counted(name.as_bytes()));
            head.extend(len_bytes.to_be_bytes());
            if len_bytes == 0 || len_bytes > rest || len_bytes % PAGE_BYTES != 0 {
                return Err(StreamFault::BlockLength { name, len_bytes });
            }
            rest -= len_bytes;
            let block = match shared.iter().position(|block| block.name == name) {
                Some(index) if shared[index].len_bytes == len_bytes => Block::Shared(index),
                Some(index) => {
                    let expected = shared[index].len_bytes;
                    return Err(StreamFault::SharedLength { name, found: len_bytes, expected });
                }
                None => Block::Unshared(unshared.add(&name, len_bytes)?),
            };
            if this.by_name.insert(name.as_str().into(), block).is_some() {
                return Err(StreamFault::BlockTwice(name));
            }
        }
        match shared.iter().find(|block| !this.by_name.contains_key(block.name.as_str())) {
            Some(block) => Err(StreamFault::SharedMissing(block.name.clone())),
            None => Ok(this),
        }
    }
}

/// The name of a block.
pub(crate) fn name(bytes: &[u8]) -> Result<&str, StreamFault> {
    let name = std::str::from_utf8(bytes).ok().filter(|name| !name.is_empty());
    name.ok_or_else(|| StreamFault::BlockName(bytes.to_vec()))
}

//! The records of a section of RAM.

use crate::names::{Content, PageNames, SharedBlock};
use crate::page::{KeptPage, Marks, PAGE_BYTES};
use crate::stream::blocks::{self, Block, Blocks};
use crate::stream::cursor::Cursor;
use crate::stream::error::StreamFault;
use crate::stream::flags::{self, RecordFlags};
use crate::stream::unshared::Unshared;
use crate::stream::watch::{Stage, Watch};

/// RAM as the stream has named it until now.
pub(crate) struct Ram<'a> {
    shared: &'a [SharedBlock],
    names: &'a dyn PageNames,
    /// `None` until the table was read.
    blocks: Option<Blocks>,
    /// The block that a record continues if it has no name: it lasts from section to section.
    current: Option<Block>,
    pub(crate) unshared: Unshared,
    pub(crate) marks: Marks,
}

impl<'a> Ram<'a> {
    pub(crate) fn new(shared: &'a [SharedBlock], names: &'a dyn PageNames, unshared_max_bytes: u64) -> Self {
        let unshared = Unshared::new(unshared_max_bytes);
        Self { shared, names, blocks: None, current: None, unshared, marks: Marks::default() }
    }

    /// Reads the table, the first record of START, and adds it to the blob's head.
    pub(crate) fn read_table(
        &mut self,
        cursor: &mut Cursor<'_>,
        head: &mut Vec<u8>,
    ) -> Result<(), StreamFault> {
        cursor.begin_item();
        let word = cursor.u64()?;
        if word & flags::MASK != flags::MEM_SIZE {
            return Err(StreamFault::Table);
        }
        head.extend(word.to_be_bytes());
        let total = word & !flags::MASK;
        self.blocks = Some(Blocks::read(cursor, total, self.shared, &mut self.unshared, head)?);
        Ok(())
    }

    /// Reads records to the mark that ends the section.
    pub(crate) fn read_records(
        &mut self,
        cursor: &mut Cursor<'_>,
        watch: &mut dyn Watch,
    ) -> Result<(), StreamFault> {
        loop {
            cursor.begin_item();
            let word = cursor.u64()?;
            let (offset, flags) = (word & !flags::MASK, word & flags::MASK);
            match flags & !flags::CONTINUE {
                kind @ (flags::PAGE | flags::ZERO) => {
                    if flags & flags::CONTINUE == 0 {
                        self.current = Some(self.named_block(cursor)?);
                    }
                    let block = self.current.ok_or(StreamFault::NoBlock)?;
                    self.read_page(cursor, block, offset, kind)?;
                }
                _ if word == flags::EOS => {
                    self.marks.sections += 1;
                    return Ok(());
                }
                _ if word == flags::MULTIFD_FLUSH => {
                    self.marks.flushes += 1;
                    watch.reached(Stage::Flush, self.marks);
                }
                _ if flags == flags::MEM_SIZE => return Err(StreamFault::Table),
                _ => return Err(StreamFault::Flags(RecordFlags(flags))),
            }
        }
    }

    fn named_block(&self, cursor: &mut Cursor<'_>) -> Result<Block, StreamFault> {
        let name = blocks::name(cursor.counted()?)?;
        let block = self.blocks.as_ref().and_then(|blocks| blocks.block(name));
        block.ok_or_else(|| StreamFault::UnknownBlock(name.to_owned()))
    }

    fn read_page(
        &mut self,
        cursor: &mut Cursor<'_>,
        block: Block,
        offset: u64,
        kind: u64,
    ) -> Result<(), StreamFault> {
        let content = if kind == flags::ZERO { Content::Zero } else { Content::Bytes };
        match block {
            Block::Shared(index) => {
                let of = &self.shared[index];
                if offset >= of.len_bytes {
                    return Err(StreamFault::PageOutside { name: of.name.clone(), offset });
                }
                match content {
                    Content::Zero => read_fill_byte(cursor)?,
                    Content::Bytes => {
                        cursor.expect_page_bytes();
                        cursor.skip(PAGE_BYTES)?;
                    }
                }
                self.names.named(index, offset / PAGE_BYTES, content);
            }
            Block::Unshared(index) => {
                let page = self.unshared.page(index, offset, self.marks)?;
                match content {
                    Content::Zero => {
                        read_fill_byte(cursor)?;
                        *page = KeptPage::Zero;
                    }
                    Content::Bytes => {
                        cursor.expect_page_bytes();
                        cursor.fill(page.bytes_mut())?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn read_fill_byte(cursor: &mut Cursor<'_>) -> Result<(), StreamFault> {
    cursor.expect_zero_pages();
    match cursor.u8()? {
        0 => Ok(()),
        byte => Err(StreamFault::FillByte(byte)),
    }
}

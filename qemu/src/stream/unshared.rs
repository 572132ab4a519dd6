//! The pages of blocks that are not shared: the latest contents of each.

use std::collections::BTreeMap;
use std::io::{self, Write};

use crate::multifd::pages::ChannelPages;
use crate::page::{KeptPage, Marks, PAGE_BYTES};
use crate::stream::encode;
use crate::stream::error::StreamFault;
use crate::stream::flags;

/// Blocks in the order of the table.
#[derive(Debug)]
pub(crate) struct Unshared {
    blocks: Vec<UnsharedBlock>,
    len_bytes: u64,
    max_bytes: u64,
}

#[derive(Debug)]
struct UnsharedBlock {
    name: String,
    len_bytes: u64,
    /// By number, with the marks before its record.
    pages: BTreeMap<u64, (Marks, KeptPage)>,
}

impl Unshared {
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self { blocks: Vec::new(), len_bytes: 0, max_bytes }
    }

    /// Adds a block, and returns its index.
    pub(crate) fn add(&mut self, name: &str, len_bytes: u64) -> Result<usize, StreamFault> {
        self.len_bytes = self.len_bytes.saturating_add(len_bytes);
        if self.len_bytes > self.max_bytes {
            let (name, bytes, max) = (name.to_owned(), self.len_bytes, self.max_bytes);
            return Err(StreamFault::UnsharedTooLarge { name, bytes, max });
        }
        self.blocks.push(UnsharedBlock { name: name.to_owned(), len_bytes, pages: BTreeMap::new() });
        Ok(self.blocks.len() - 1)
    }

    /// A page, whose contents the caller replaces.
    pub(crate) fn page(
        &mut self,
        block: usize,
        offset: u64,
        marks: Marks,
    ) -> Result<&mut KeptPage, StreamFault> {
        let block = &mut self.blocks[block];
        if offset >= block.len_bytes {
            return Err(StreamFault::PageOutside { name: block.name.clone(), offset });
        }
        let page = block.pages.entry(offset / PAGE_BYTES).or_insert((marks, KeptPage::Zero));
        page.0 = marks;
        Ok(&mut page.1)
    }

    /// Adds the pages that came on other channels. A page that came on both has the contents of the later
    /// one: QEMU names a page once at most between two marks.
    pub(crate) fn merge(&mut self, pages: ChannelPages, all: Marks) -> Result<(), StreamFault> {
        for (name, pages) in pages.into_blocks() {
            let block = self.blocks.iter_mut().find(|block| block.name == name);
            let block = block.ok_or_else(|| StreamFault::UnknownBlock(name.clone()))?;
            for (number, from_channel) in pages {
                let offset = number.saturating_mul(PAGE_BYTES);
                if offset >= block.len_bytes {
                    return Err(StreamFault::PageOutside { name, offset });
                }
                if let Some((marks, page)) = block.pages.get(&number) {
                    let syncs = marks.within(all);
                    if syncs > from_channel.syncs || *page == from_channel.page {
                        continue;
                    }
                    if syncs == from_channel.syncs {
                        return Err(StreamFault::TwoVersions { name, offset });
                    }
                }
                block.pages.insert(number, (all, from_channel.page));
            }
        }
        Ok(())
    }

    /// The pages as records of a stream.
    pub(crate) fn write_records(&self, to: &mut dyn Write) -> io::Result<()> {
        for block in &self.blocks {
            let mut continued = 0;
            for (number, (_, page)) in &block.pages {
                let kind = if let KeptPage::Zero = page { flags::ZERO } else { flags::PAGE };
                let offset = number * PAGE_BYTES;
                to.write_all(&(offset | kind | continued).to_be_bytes())?;
                if continued == 0 {
                    to.write_all(&encode::counted(block.name.as_bytes()).collect::<Vec<_>>())?;
                    continued = flags::CONTINUE;
                }
                match page {
                    KeptPage::Zero => to.write_all(&[0])?,
                    KeptPage::Bytes(bytes) => to.write_all(bytes)?,
                }
            }
        }
        Ok(())
    }

    /// How many bytes [`write_records`](Self::write_records) writes.
    pub(crate) fn records_len(&self) -> u64 {
        let page_len = |page: &KeptPage| 8 + if let KeptPage::Bytes(_) = page { PAGE_BYTES } else { 1 };
        let with_pages = self.blocks.iter().filter(|block| !block.pages.is_empty());
        let lens = with_pages.map(|block| {
            let pages: u64 = block.pages.values().map(|(_, page)| page_len(page)).sum();
            1 + block.name.len() as u64 + pages
        });
        lens.sum()
    }
}

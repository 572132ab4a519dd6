//! The pages of blocks that are not shared, as multifd channels bring them.

use std::collections::BTreeMap;

use crate::multifd::error::PacketFault;
use crate::page::{KeptPage, PAGE_BYTES};

/// A machine has a few dozen.
const BLOCKS_MAX: usize = 4096;

/// Pages of blocks that are not shared: the latest contents of each, which the blob needs.
#[derive(Debug, Default)]
pub struct ChannelPages {
    blocks: BTreeMap<String, BTreeMap<u64, ChannelPage>>,
    len: u64,
}

/// A page with its place in the order of the stream.
#[derive(Debug)]
pub(crate) struct ChannelPage {
    /// How many SYNC packets its channel had before.
    pub(crate) syncs: u64,
    channel: u8,
    pub(crate) page: KeptPage,
}

/// Where a page came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) channel: u8,
    pub(crate) syncs: u64,
}

impl ChannelPages {
    /// Keeps a page unless a later one is there. `None` is a page of zeros.
    pub(crate) fn keep(
        &mut self,
        name: &str,
        offset: u64,
        bytes: Option<&[u8]>,
        origin: Origin,
        max_bytes: u64,
    ) -> Result<(), PacketFault> {
        let too_large = PacketFault::UnsharedTooLarge { max: max_bytes };
        if !self.blocks.contains_key(name) {
            if self.blocks.len() == BLOCKS_MAX {
                return Err(too_large);
            }
            self.blocks.insert(name.to_owned(), BTreeMap::new());
        }
        let Some(pages) = self.blocks.get_mut(name) else { return Ok(()) };
        let number = offset / PAGE_BYTES;
        let Origin { channel, syncs } = origin;
        if let Some(kept) = pages.get(&number) {
            if kept.syncs > syncs || (kept.syncs == syncs && kept.has(bytes)) {
                return Ok(());
            }
            if kept.syncs == syncs && kept.channel != channel {
                return Err(PacketFault::TwoVersions { name: name.to_owned(), offset });
            }
        } else {
            if self.len >= max_bytes / PAGE_BYTES {
                return Err(too_large);
            }
            self.len += 1;
        }
        let kept = pages.entry(number).or_insert(ChannelPage { syncs, channel, page: KeptPage::Zero });
        (kept.syncs, kept.channel) = (syncs, channel);
        match bytes {
            Some(bytes) => kept.page.bytes_mut().copy_from_slice(bytes),
            None => kept.page = KeptPage::Zero,
        }
        Ok(())
    }

    /// The pages of each block, by number.
    pub(crate) fn into_blocks(self) -> BTreeMap<String, BTreeMap<u64, ChannelPage>> {
        self.blocks
    }
}

impl ChannelPage {
    fn has(&self, bytes: Option<&[u8]>) -> bool {
        match (&self.page, bytes) {
            (KeptPage::Zero, None) => true,
            (KeptPage::Bytes(kept), Some(bytes)) => **kept == *bytes,
            _ => false,
        }
    }
}

//! Reads one channel to its end.

use std::io;
use std::sync::Arc;

use crate::input::Input;
use crate::multifd::error::{ChannelError, PacketFault};
use crate::multifd::header::{Dialect, HEADER_LEN, Header, INIT_LEN, Init};
use crate::multifd::pages::Origin;
use crate::multifd::progress::Progress;
use crate::names::{Content, PageNames, SharedBlock};
use crate::page::{PAGE_BYTES, PAGE_LEN};

/// One channel while it is read.
pub(crate) struct Channel<'a> {
    pub(crate) input: &'a mut dyn Input,
    pub(crate) dialect: Dialect,
    pub(crate) shared: &'a [SharedBlock],
    pub(crate) names: &'a dyn PageNames,
    pub(crate) progress: &'a Progress,
}

/// Where in its channel a reader is.
#[derive(Default)]
struct Place {
    number: Option<u8>,
    packet: u64,
    offset: u64,
}

impl Channel<'_> {
    pub(crate) fn read(mut self) -> Result<(), ChannelError> {
        let mut place = Place::default();
        let result = self.read_from(&mut place);
        let Place { number, packet, offset } = place;
        let result = result.map_err(|fault| ChannelError { channel: number, packet, offset, fault });
        self.progress.ended(number, result)
    }

    fn read_from(&mut self, place: &mut Place) -> Result<(), PacketFault> {
        let mut init = [0; INIT_LEN];
        self.input.read_exact(&mut init).map_err(fault)?;
        let init = Init::decode(&init)?;
        self.progress.connect(init)?;
        place.number = Some(init.number);
        place.offset = INIT_LEN as u64;
        let mut origin = Origin { channel: init.number, syncs: 0 };
        let mut bytes = [0; HEADER_LEN];
        loop {
            let read = self.input.read_some(&mut bytes).map_err(fault)?;
            if read == 0 {
                return Ok(());
            }
            self.input.read_exact(&mut bytes[read..]).map_err(fault)?;
            let header = Header::decode(&bytes, self.dialect)?;
            self.read_pages(&header, origin)?;
            let pages = header.normal_pages().len();
            self.progress.read_packet(pages + header.zero_pages().len() > 0)?;
            if header.sync {
                origin.syncs += 1;
                self.progress.synced(init.number);
            }
            place.packet += 1;
            place.offset += HEADER_LEN as u64 + pages as u64 * PAGE_BYTES;
        }
    }

    fn read_pages(&mut self, header: &Header<'_>, origin: Origin) -> Result<(), PacketFault> {
        let block = self.shared.iter().position(|block| block.name == header.block);
        let Some(index) = block else { return self.keep_pages(header, origin) };
        let (normal, zero) = (header.normal_pages(), header.zero_pages());
        let len_bytes = self.shared[index].len_bytes;
        if let Some(offset) = header.normal_pages().chain(header.zero_pages()).find(|page| *page >= len_bytes)
        {
            return Err(PacketFault::Offset { name: header.block.to_owned(), offset });
        }
        let data_len = normal.len() as u64 * PAGE_BYTES;
        if data_len > 0 {
            self.input.skip(data_len).map_err(fault)?;
        }
        normal.for_each(|offset| self.names.named(index, offset / PAGE_BYTES, Content::Bytes));
        zero.for_each(|offset| self.names.named(index, offset / PAGE_BYTES, Content::Zero));
        Ok(())
    }

    fn keep_pages(&mut self, header: &Header<'_>, origin: Origin) -> Result<(), PacketFault> {
        let mut page = [0; PAGE_LEN];
        for offset in header.normal_pages() {
            self.input.read_exact(&mut page).map_err(fault)?;
            self.progress.keep(header.block, offset, Some(&page), origin)?;
        }
        for offset in header.zero_pages() {
            self.progress.keep(header.block, offset, None, origin)?;
        }
        Ok(())
    }
}

fn fault(error: io::Error) -> PacketFault {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => PacketFault::Ends,
        _ => PacketFault::Input(Arc::new(error)),
    }
}

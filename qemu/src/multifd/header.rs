//! The fixed parts of a channel: its first packet, and the header of those with pages.

use crate::multifd::error::PacketFault;
use crate::page::PAGE_BYTES;

/// The length of a channel's first packet.
pub(crate) const INIT_LEN: usize = 64;
/// The length of a header, with the room for the offsets.
pub(crate) const HEADER_LEN: usize = OFFSETS + PAGES_MAX * 8;
/// Pages of a packet at most: 512 KiB.
pub(crate) const PAGES_MAX: usize = 128;

const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// Where the name of the block is, and its room.
const NAME: std::ops::Range<usize> = 64..320;
const OFFSETS: usize = NAME.end;

const SYNC: u32 = 1;
const COMPRESSED: &str = "multifd-compression must be none";
/// Bits, QEMU's names, and what must be off.
const REFUSED: [(u32, &str, &str); 6] = [
    (1 << 1, "ZLIB", COMPRESSED),
    (2 << 1, "ZSTD", COMPRESSED),
    (4 << 1, "QPL", COMPRESSED),
    (8 << 1, "UADK", COMPRESSED),
    (16 << 1, "QATZIP", COMPRESSED),
    (32 << 1, "DEVICE_STATE", "a guest with a VFIO device cannot be moved"),
];

/// The form of a packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// QEMU 7.2 to 8.2: pages of zeros are in the main channel alone.
    Seven,
    /// QEMU 9.0 and later: packets list pages of zeros too, unless the machine type is older.
    Nine,
}

/// A channel's first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Init {
    pub(crate) uuid: [u8; 16],
    pub(crate) number: u8,
}

impl Init {
    pub(crate) fn decode(bytes: &[u8; INIT_LEN]) -> Result<Self, PacketFault> {
        check_magic(bytes)?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[8..24]);
        Ok(Self { uuid, number: bytes[24] })
    }
}

/// A packet's header.
#[derive(Debug)]
pub(crate) struct Header<'a> {
    pub(crate) sync: bool,
    /// Empty in a packet without pages.
    pub(crate) block: &'a str,
    /// Pages whose bytes follow.
    normal: usize,
    offsets: &'a [u8],
}

impl<'a> Header<'a> {
    pub(crate) fn decode(bytes: &'a [u8; HEADER_LEN], dialect: Dialect) -> Result<Self, PacketFault> {
        check_magic(bytes)?;
        let [flags, allocated, normal, next] = [8, 12, 16, 20].map(|at| u32_at(bytes, at));
        check_flags(flags)?;
        let zero = u32_at(bytes, 32);
        if dialect == Dialect::Seven && zero > 0 {
            return Err(PacketFault::ZeroPages(zero));
        }
        let sync = flags & SYNC != 0;
        let pages = u64::from(normal) + u64::from(zero);
        // A packet without pages has the length of an earlier one with QEMU 7.2, and its block's name.
        if pages == 0 {
            return Ok(Self { sync, block: "", normal: 0, offsets: &[] });
        }
        let room = PAGES_MAX.min(usize::try_from(allocated).unwrap_or(PAGES_MAX));
        let (normal_pages, pages) = match (usize::try_from(normal), usize::try_from(pages)) {
            (Ok(normal), Ok(pages)) if pages <= room => (normal, pages),
            _ => return Err(PacketFault::Pages { normal, zero, allocated }),
        };
        if normal > 0 && u64::from(next) != u64::from(normal) * PAGE_BYTES {
            return Err(PacketFault::Length { next, normal });
        }
        let block = block_name(&bytes[NAME])?;
        let offsets = &bytes[OFFSETS..OFFSETS + pages * 8];
        let this = Self { sync, block, normal: normal_pages, offsets };
        let odd = this.offsets(0..pages).find(|offset| offset % PAGE_BYTES != 0);
        match odd {
            Some(offset) => Err(PacketFault::Offset { name: block.to_owned(), offset }),
            None => Ok(this),
        }
    }

    /// Offsets of the pages whose bytes follow.
    pub(crate) fn normal_pages(&self) -> impl ExactSizeIterator<Item = u64> {
        self.offsets(0..self.normal)
    }

    /// Offsets of the pages of zeros.
    pub(crate) fn zero_pages(&self) -> impl ExactSizeIterator<Item = u64> {
        self.offsets(self.normal..self.offsets.len() / 8)
    }

    fn offsets(&self, pages: std::ops::Range<usize>) -> impl ExactSizeIterator<Item = u64> {
        let (words, _) = self.offsets[pages.start * 8..pages.end * 8].as_chunks();
        words.iter().map(|word| u64::from_be_bytes(*word))
    }
}

fn check_magic(bytes: &[u8]) -> Result<(), PacketFault> {
    let (magic, version) = (u32_at(bytes, 0), u32_at(bytes, 4));
    if (magic, version) == (MAGIC, VERSION) { Ok(()) } else { Err(PacketFault::Magic { magic, version }) }
}

fn check_flags(flags: u32) -> Result<(), PacketFault> {
    let flags = flags & !SYNC;
    if flags == 0 {
        return Ok(());
    }
    let known = REFUSED.iter().find(|(bit, ..)| flags & bit != 0);
    let (_, name, remedy) = *known.unwrap_or(&(0, "no name", "this version of QEMU is not supported"));
    Err(PacketFault::Flags { flags, name, remedy })
}

fn block_name(field: &[u8]) -> Result<&str, PacketFault> {
    let end = field.iter().position(|byte| *byte == 0).ok_or(PacketFault::BlockName)?;
    let name = std::str::from_utf8(&field[..end]).ok().filter(|name| !name.is_empty());
    name.ok_or(PacketFault::BlockName)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

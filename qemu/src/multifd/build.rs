//! Packets as QEMU writes them, for tests.

use crate::multifd::header::{HEADER_LEN, INIT_LEN, PAGES_MAX};
use crate::page::PAGE_LEN;

/// The first packet of a channel.
pub(crate) fn init(number: u8) -> Vec<u8> {
    let mut bytes = vec![0; INIT_LEN];
    put(&mut bytes, 0, 0x1122_3344);
    put(&mut bytes, 4, 1);
    bytes[8..24].fill(0xa5);
    bytes[24] = number;
    bytes
}

/// A packet; pages whose bytes follow have a byte that fills them.
pub(crate) fn packet(flags: u32, block: &str, normal: &[(u64, u8)], zero: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    let len = |pages: usize| u32::try_from(pages).unwrap();
    put(&mut bytes, 0, 0x1122_3344);
    put(&mut bytes, 4, 1);
    put(&mut bytes, 8, flags);
    put(&mut bytes, 12, len(PAGES_MAX));
    put(&mut bytes, 16, len(normal.len()));
    put(&mut bytes, 20, len(normal.len() * PAGE_LEN));
    put(&mut bytes, 32, len(zero.len()));
    bytes[64..64 + block.len()].copy_from_slice(block.as_bytes());
    let offsets = normal.iter().map(|(offset, _)| *offset).chain(zero.iter().copied());
    for (index, offset) in offsets.enumerate() {
        bytes[320 + index * 8..328 + index * 8].copy_from_slice(&offset.to_be_bytes());
    }
    normal.iter().for_each(|(_, fill)| bytes.extend([*fill; PAGE_LEN]));
    bytes
}

/// A SYNC packet of QEMU 9.0 and later.
pub(crate) fn sync() -> Vec<u8> {
    let mut bytes = packet(1, "", &[], &[]);
    put(&mut bytes, 12, 0);
    bytes
}

/// A SYNC packet of QEMU 7.2, with the length and the block of an earlier packet.
pub(crate) fn stale_sync(block: &str) -> Vec<u8> {
    let mut bytes = packet(1, block, &[], &[]);
    put(&mut bytes, 20, 233_472);
    bytes
}

/// Changes a number of a packet.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

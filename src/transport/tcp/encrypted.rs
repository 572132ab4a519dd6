//! Pages on a lane with TLS.
//!
//! Guest memory is no buffer that TLS may read or write: the guest changes it meanwhile. So pages are copied
//! between guest RAM and buffers that stay in a processor's second-level cache.

use std::io::{self, BufRead, Read, Write};

use sterna_trust::TlsStream;

use crate::memory::{GuestSlice, PAGE_LEN};

/// Sends `head` and then all `slices`. `buffer` is kept for its allocation.
pub(super) fn send_encrypted(
    stream: &mut TlsStream,
    buffer: &mut Vec<u8>,
    head: &[u8],
    slices: &[GuestSlice<'_>],
) -> io::Result<()> {
    buffer.resize(SENT_AT_ONCE.max(head.len() + PAGE_LEN), 0);
    buffer[..head.len()].copy_from_slice(head);
    let mut filled = head.len();
    for page in slices.iter().flat_map(|slice| slice.pages()) {
        if filled + PAGE_LEN > buffer.len() {
            stream.write_all(&buffer[..filled])?;
            filled = 0;
        }
        page.copy_to(&mut buffer[filled..filled + PAGE_LEN]);
        filled += PAGE_LEN;
    }
    stream.write_all(&buffer[..filled])
}

/// Fills all `slices`, in order, and then `next` with the bytes that follow.
pub(super) fn receive_decrypted(
    stream: &mut TlsStream,
    slices: &[GuestSlice<'_>],
    next: &mut [u8],
) -> io::Result<()> {
    let mut parts = [0; PAGE_LEN];
    for page in slices.iter().flat_map(|slice| slice.pages()) {
        match stream.fill_buf()?.get(..PAGE_LEN) {
            Some(bytes) => {
                page.copy_from(bytes);
                stream.consume(PAGE_LEN);
            }
            // It comes in two reads.
            None => {
                stream.read_exact(&mut parts)?;
                page.copy_from(&parts);
            }
        }
    }
    stream.read_exact(next)
}

/// How many bytes are encrypted at once: sixteen records.
const SENT_AT_ONCE: usize = 256 << 10;

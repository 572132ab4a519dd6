//! What the destination QEMU loads once all shared RAM is in place.

use std::io::{self, BufWriter, Write};

use crate::stream::flags;
use crate::stream::kinds::FOOTER;
use crate::stream::unshared::Unshared;

/// A whole migration stream without pages of shared RAM, for a QEMU without multifd and without return path.
#[derive(Debug)]
pub struct Blob {
    /// From the header to the head of RAM's last section.
    pub(crate) head: Vec<u8>,
    pub(crate) unshared: Unshared,
    /// QEMU's number of RAM's sections.
    pub(crate) ram_id: u32,
    pub(crate) state: Vec<u8>,
}

impl Blob {
    /// How many bytes [`write_to`](Self::write_to) writes.
    pub fn len_bytes(&self) -> u64 {
        let copied = self.head.len() + self.ram_end().len() + self.state.len();
        copied as u64 + self.unshared.records_len()
    }

    /// Writes the stream.
    pub fn write_to(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut buffered = BufWriter::new(to);
        buffered.write_all(&self.head)?;
        self.unshared.write_records(&mut buffered)?;
        buffered.write_all(&self.ram_end())?;
        buffered.write_all(&self.state)?;
        buffered.flush()
    }

    /// The mark that ends RAM's last section, and the footer.
    fn ram_end(&self) -> [u8; 13] {
        let mut end = [0; 13];
        end[..8].copy_from_slice(&flags::EOS.to_be_bytes());
        end[8..].copy_from_slice(&footer(self.ram_id));
        end
    }
}

/// The bytes that end a section.
pub(crate) fn footer(id: u32) -> [u8; 5] {
    let [a, b, c, d] = id.to_be_bytes();
    [FOOTER, a, b, c, d]
}

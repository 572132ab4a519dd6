//! Memory in which no page has data.

use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::{PAGE_BYTES, SharedRam};

impl SharedRam {
    /// Makes all pages zero, before a guest arrives: the source does not send pages that it never wrote.
    ///
    /// A QEMU that waits for a guest has written none, usually. Pages that it allocated at the start stay
    /// allocated as far as they are zero, and so do huge pages, because others may take them from their pool.
    ///
    /// # Errors
    /// The system's, if the file cannot be written to.
    pub fn make_fresh(&self) -> io::Result<()> {
        if !self.prealloc && self.page_bytes == PAGE_BYTES {
            return self.free(self.offset_bytes, self.block.len_bytes);
        }
        let part_bytes = self.page_bytes.max(PART_BYTES_MIN);
        let (zeros, mut part) = (vec![0; LOOK_BYTES], vec![0; LOOK_BYTES]);
        let end = self.offset_bytes + self.block.len_bytes;
        for from in (self.offset_bytes..end).step_by(usize::try_from(part_bytes).unwrap_or(usize::MAX)) {
            let to = end.min(from + part_bytes);
            for at in (from..to).step_by(LOOK_BYTES) {
                let len = usize::try_from(to - at).unwrap_or(LOOK_BYTES).min(LOOK_BYTES);
                self.file.read_exact_at(&mut part[..len], at)?;
                if part[..len] != zeros[..len] {
                    self.free(from, to - from)?;
                    break;
                }
            }
        }
        Ok(())
    }

    fn free(&self, from: u64, len_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, from, len_bytes)?)
    }
}

/// How much is freed at once, at least.
const PART_BYTES_MIN: u64 = 1 << 20;

/// How much is read at once.
const LOOK_BYTES: usize = 1 << 18;

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::names::SharedBlock;

    const LEN: u64 = (3 << 20) + 4096;

    fn ram(file: &File, prealloc: bool) -> SharedRam {
        let block = SharedBlock { name: "mem".into(), len_bytes: LEN };
        let file = file.try_clone().unwrap();
        SharedRam { block, file, offset_bytes: 4096, page_bytes: PAGE_BYTES, prealloc }
    }

    #[test]
    fn memory_is_zero_and_what_lies_around_it_stays() {
        for prealloc in [false, true] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(LEN + 2 * 4096).unwrap();
            for at in [0, 4096, 5 << 18, LEN + 4095, LEN + 4096] {
                file.write_all_at(b"x", at).unwrap();
            }
            ram(&file, prealloc).make_fresh().unwrap();
            let mut all = vec![0; usize::try_from(LEN + 2 * 4096).unwrap()];
            file.read_exact_at(&mut all, 0).unwrap();
            let written: Vec<_> =
                (0u64..).zip(&all).filter(|(_, byte)| **byte != 0).map(|(at, _)| at).collect();
            assert_eq!(written, [0, LEN + 4096], "{prealloc}");
        }
    }
}

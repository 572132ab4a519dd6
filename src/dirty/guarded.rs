//! A buffer for kernel calls that choose the length they write.
#![expect(unsafe_code, reason = "a mapping with inaccessible pages behind it, which no safe wrapper makes")]

use std::ptr::NonNull;
use std::{io, ptr, slice};

/// The longest bitmap that `KVM_GET_DIRTY_LOG` writes: for 2^31 pages, one more than a memory slot may have
/// (`KVM_MEM_MAX_NR_PAGES`).
const BITMAP_BYTES_MAX: usize = (1 << 31) / 8;

/// A multiple of the page size of any host.
const PAGE_BYTES_MAX: usize = 64 << 10;

/// Words that end where inaccessible pages begin: if the kernel writes past the end, the call fails with
/// `EFAULT`, and nothing is overwritten.
///
/// The inaccessible pages are as long as the longest bitmap, so this holds in whatever order the kernel
/// copies.
#[derive(Debug)]
pub(super) struct GuardedWords {
    mapping: NonNull<u8>,
    /// The length of the accessible part, from the mapping's start.
    open_bytes: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread, and only borrows of the owner lead to it.
unsafe impl Send for GuardedWords {}

impl GuardedWords {
    /// Space for at most this many words, zero at first.
    pub(super) fn new(words: usize) -> io::Result<Self> {
        let too_many = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = words.checked_mul(size_of::<u64>()).ok_or_else(too_many)?;
        let open_bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES_MAX).ok_or_else(too_many)?;
        let mapped_bytes = open_bytes.checked_add(BITMAP_BYTES_MAX).ok_or_else(too_many)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping; the kernel chooses its address.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), mapped_bytes, libc::PROT_NONE, flags, -1, 0) };
        let mapping = NonNull::new(mapped).filter(|_| mapped != libc::MAP_FAILED);
        let mapping = mapping.ok_or_else(io::Error::last_os_error)?.cast();
        let guarded = Self { mapping, open_bytes };
        // SAFETY: the first part of the mapping just made, to which no reference exists yet.
        let opened =
            unsafe { libc::mprotect(mapped, guarded.open_bytes, libc::PROT_READ | libc::PROT_WRITE) };
        if opened == 0 { Ok(guarded) } else { Err(io::Error::last_os_error()) }
    }

    /// The last `len` words before the inaccessible pages, or all if there are fewer.
    pub(super) fn last(&mut self, len: usize) -> &mut [u64] {
        let len = len.min(self.open_bytes / size_of::<u64>());
        let offset = self.open_bytes - len * size_of::<u64>();
        // SAFETY: `offset` is at most the accessible length.
        let first = unsafe { self.mapping.add(offset) };
        // SAFETY: the range is accessible memory of this mapping alone, borrowed with `self`. It is aligned,
        // because its end is a page's end and its length is in words, and any bits are a valid word.
        unsafe { slice::from_raw_parts_mut(first.cast().as_ptr(), len) }
    }
}

impl Drop for GuardedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone, of this length, and not used any more.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.open_bytes + BITMAP_BYTES_MAX) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    /// Has the kernel write this many bytes from the first of these words on.
    fn read_zeros(words: &mut [u64], bytes: usize) -> io::Result<usize> {
        let zeros = File::open("/dev/zero")?;
        // SAFETY: the memory after the words is accessible, or the kernel finds that it is not.
        let read = unsafe { libc::read(zeros.as_raw_fd(), words.as_mut_ptr().cast(), bytes) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    #[test]
    fn the_kernel_can_fill_the_words_and_write_nothing_behind_them() {
        for len in [1, 7, 8192, 8193] {
            let mut guarded = GuardedWords::new(len).unwrap();
            let words = guarded.last(len);
            assert_eq!(words.len(), len);
            words.fill(7);
            assert_eq!(read_zeros(words, len * 8).unwrap(), len * 8);
            assert!(words.iter().all(|&word| word == 0), "{len}");
            let behind = &mut words[len - 1..];
            assert_eq!(read_zeros(behind, 16).unwrap_or(8), 8, "{len}: only what is there");
        }
    }

    #[test]
    fn a_buffer_of_one_length_serves_all_shorter_ones() {
        let mut guarded = GuardedWords::new(10_000).unwrap();
        guarded.last(10_000).fill(1);
        guarded.last(3).fill(2);
        assert_eq!(guarded.last(5), [1, 1, 2, 2, 2]);
        assert!(guarded.last(0).is_empty());
    }
}

#![expect(
    unsafe_code,
    reason = "reads and writes of guest bytes through raw pointers, since others change them meanwhile"
)]

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::PAGE_LEN;
use super::simd::{self, Wide};

/// A pointer and a length inside guest RAM, valid as long as the region it was made from.
///
/// Not a Rust slice: the guest may change the bytes at any time, so a read is not a consistent snapshot
/// unless the guest is paused. The engine handles that by watching a page *before* reading it.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'ram> {
    start: NonNull<u8>,
    len: usize,
    ram: PhantomData<&'ram ()>,
}

impl<'ram> GuestSlice<'ram> {
    /// # Safety
    /// `start..start + len` must lie in one mapping that stays readable for `'ram`, and also writable if the
    /// slice is used to receive.
    pub(super) unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len, ram: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a run of no pages is never made")]
    pub fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The pages of the slice, one by one.
    pub fn pages(self) -> impl Iterator<Item = GuestSlice<'ram>> {
        (0..self.len / PAGE_LEN).map(move |page| {
            // SAFETY: `page` counts the whole pages of this slice, so the offset stays inside it.
            let start = unsafe { self.start.add(page * PAGE_LEN) };
            // SAFETY: a page of a valid slice is a valid slice.
            unsafe { GuestSlice::new(start, PAGE_LEN) }
        })
    }

    /// Copies the bytes out. A word that a vCPU writes meanwhile is the old or the new one.
    ///
    /// # Panics
    /// If `into` has another length than the slice: a mistake of the caller, never of a peer.
    pub fn copy_to(&self, into: &mut [u8]) {
        assert_eq!(into.len(), self.len, "copy of another length");
        let words = self.start.as_ptr().cast::<u64>();
        for (index, into) in into.chunks_exact_mut(size_of::<u64>()).enumerate() {
            // SAFETY: each word of the slice has a chunk, so the index is below `len / 8`.
            let address = unsafe { words.add(index) };
            // SAFETY: in bounds as above; slices are whole pages, so words are aligned and fill them.
            let word = unsafe { address.read_volatile() };
            into.copy_from_slice(&word.to_ne_bytes());
        }
    }

    /// Copies bytes in, as a transport does at a destination. A vCPU that reads a word meanwhile sees the
    /// old or the new one.
    ///
    /// # Panics
    /// If `from` has another length than the slice: a mistake of the caller, never of a peer.
    pub fn copy_from(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len, "copy of another length");
        let words = self.start.as_ptr().cast::<u64>();
        for (index, from) in from.as_chunks::<{ size_of::<u64>() }>().0.iter().enumerate() {
            // SAFETY: there is a chunk for each word of the slice, so the index is below `len / 8`.
            let address = unsafe { words.add(index) };
            // SAFETY: in bounds as above; slices are whole pages, so words are aligned and fill them. The
            // mapping is writable, as whoever made the slice has promised of one that is received into.
            unsafe { address.write_volatile(u64::from_ne_bytes(*from)) };
        }
    }

    /// Whether every byte is zero. Stops at the first 64 bytes that are not.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        /// Loads that are OR-ed between two branches: enough to make the memory bus the limit.
        const LOADS: usize = 64 / size_of::<Wide>();
        let words = self.start.as_ptr().cast::<Wide>();
        let count = self.len / size_of::<Wide>();
        (0..count / LOADS).all(|line| {
            let bits = (0..LOADS).fold(simd::zeros(), |bits, word| {
                // SAFETY: the index is below `count`.
                let address = unsafe { words.add(line * LOADS + word) };
                // SAFETY: in bounds as above; slices are whole pages, so words of any width are aligned and
                // fill them.
                simd::either(bits, unsafe { address.read_volatile() })
            });
            simd::is_zero(bits)
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use crate::memory::{GuestRam, PageRun};

    #[test]
    fn bytes_that_are_copied_in_come_out_again_and_the_neighbours_stay() {
        let memory: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 3 * 4096)]).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let page = ram.slice(PageRun { region: 0, first_page: 1, pages: 1 }).unwrap();
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().skip(1).take(4096).collect();
        page.copy_from(&bytes);
        let mut all = vec![0; 3 * 4096];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert_eq!(all[4096..8192], bytes);
        assert!(all[..4096].iter().chain(&all[8192..]).all(|&byte| byte == 0));
        let mut out = vec![0; 4096];
        page.copy_to(&mut out);
        assert_eq!(out, bytes);
    }

    #[test]
    fn one_byte_anywhere_makes_a_page_not_zero() {
        let memory: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 3 * 4096)]).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let page = ram.slice(PageRun { region: 0, first_page: 1, pages: 1 }).unwrap();
        memory.write_obj(0xffu8, GuestAddress(4095)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(8192)).unwrap();
        assert!(page.is_zero(), "the neighbours' bytes do not count");
        for offset in [0, 1, 63, 64, 2047, 4088, 4095] {
            memory.write_obj(1u8, GuestAddress(4096 + offset)).unwrap();
            assert!(!page.is_zero(), "byte {offset}");
            memory.write_obj(0u8, GuestAddress(4096 + offset)).unwrap();
        }
        assert!(page.is_zero());
    }
}

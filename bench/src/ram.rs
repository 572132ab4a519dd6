//! Generated guest RAM for the benchmarks: anonymous memory of one region.

use sterna::memory::{GuestRam, PAGE_LEN, PageRun};
use vm_memory::bitmap::NewBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// RAM without any touched page.
///
/// # Panics
/// If the host lacks the memory.
#[must_use]
pub fn untouched<B: NewBitmap>(len_bytes: usize) -> GuestMemoryMmap<B> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len_bytes)]).expect("the memory can be reserved")
}

/// RAM with all its pages allocated: each begins with `word`, the rest is zero.
///
/// Pages that are only reserved would all be read from one page of zeros, which measures nothing.
///
/// # Panics
/// If the host lacks the memory.
#[must_use]
pub fn touched(len_bytes: usize, word: u64) -> GuestRam {
    let memory = untouched::<()>(len_bytes);
    for start in (0..len_bytes as u64).step_by(PAGE_LEN) {
        memory.write_obj(word, GuestAddress(start)).expect("the page is in the region");
    }
    GuestRam::from_vm_memory(&memory).expect("one region of whole pages is RAM")
}

/// The run of `pages` pages from `first_page` on.
#[must_use]
pub fn run(first_page: u64, pages: u64) -> PageRun {
    PageRun { region: 0, first_page, pages }
}

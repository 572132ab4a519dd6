//! Guest RAM as the engine sees it.
//!
//! Guest RAM is written at any time by vCPUs, by device threads and by RDMA hardware, so nothing here ever makes a Rust
//! reference to it. A [`GuestRam`] is a list of [`RamRegion`]s; a [`GuestSlice`] is a bounds-checked pointer and length
//! inside one of them, and its few operations (copy, zero test, vectored socket I/O) are all that the rest of the
//! library can do with guest bytes.
//!
//! This is one of the few rooms with `unsafe`: the pointers of the mapping, and the system calls that take them.

mod change;
mod error;
mod holes;
mod io;
mod mapped;
mod region;
mod run;
mod runs;
mod simd;
mod slice;

pub use change::RamChange;
pub use error::MemoryError;
pub use holes::TouchedSearch;
pub use io::{receive_into, send_from};
pub use mapped::MappedSearch;
pub use region::{GuestRam, RamLayout, RamRegion, RawBacking, RegionLayout};
pub use run::PageRun;
pub use runs::{RunEdges, Runs};
pub use slice::GuestSlice;

/// The unit in which memory is tracked and moved, in bytes. KVM's dirty log counts in host pages, 4 KiB on x86-64.
pub const PAGE_BYTES: u64 = 4096;

/// [`PAGE_BYTES`] for sizes in memory.
pub const PAGE_LEN: usize = 4096;

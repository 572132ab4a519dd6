//! Guest RAM as the engine accesses it.
//!
//! vCPUs, device threads and RDMA hardware write guest RAM at any time, so the engine never makes a Rust
//! reference to it. A [`GuestRam`] is a list of [`RamRegion`]s. A [`GuestSlice`] is a bounds-checked pointer
//! and length inside a region, and its few operations (copy, zero test, vectored socket I/O) are the only
//! access of the rest of the library to guest bytes.
//!
//! This is one of the few rooms with `unsafe`: the pointers of the mapping, and the system calls that take
//! them.

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

unstable! { use change::RamChange; }
pub use error::MemoryError;
unstable! { use holes::TouchedSearch; }
unstable! { use io::{receive_into, send_from}; }
unstable! { use mapped::MappedSearch; }
pub use region::{GuestRam, RamLayout, RamRegion, RawBacking, RegionLayout};
unstable! { use run::PageRun; }
unstable! { use runs::{RunEdges, Runs}; }
unstable! { use slice::GuestSlice; }

/// The unit in which memory is tracked and moved, in bytes. KVM's dirty log counts in host pages, 4 KiB on
/// x86-64.
pub const PAGE_BYTES: u64 = 4096;

unstable! {
    const PAGE_LEN: usize = 4096; // `PAGE_BYTES` as a `usize`.
}

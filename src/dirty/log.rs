//! The record of written pages that the engine reads.

use std::fmt::Debug;

use super::error::DirtyError;
use super::region::DirtyRegion;

/// A record of written pages that can be read while the guest runs.
///
/// Regions are those of the guest's [`GuestRam`](crate::memory::GuestRam), by index from 0. Pages are
/// [`PAGE_BYTES`](crate::memory::PAGE_BYTES) of 4 KiB each, whatever pages the memory is made of, and are
/// numbered from 0 within their region. Bitmaps have one bit a page in words of 64, the first page in bit 0
/// of the first word.
///
/// The engine calls [`start`](Self::start) once, then [`harvest`](Self::harvest) for each region and
/// [`clear`](Self::clear) for parts of the region, round after round, and [`stop`](Self::stop) if the attempt
/// fails. `harvest` and `clear` are called from several threads at once, for different regions or pages.
///
/// # A log fed by a stream
///
/// The VMM may be another process that names pages in a stream. A thread of this process then reads the
/// stream and marks the pages in a bitmap, such as [`SoftwareBitmap`](super::SoftwareBitmap); `harvest`
/// [takes](super::SoftwareBitmap::take) the marks, and `clear` has nothing to do. Two rules keep every write:
///
/// - The VMM names a page only after it has written it. A page that is named first may be read before the
///   write.
/// - Once [`pause`](crate::guest::SourceGuest::pause) has returned, all pages that were written are marked:
///   the VMM sends the answer to `pause` after the last name, in the same stream.
///
/// A stream that breaks is an error of the next harvest, [`DirtyError::Vmm`].
pub trait DirtyLog: Send + Sync + Debug {
    /// Begins to record. Every write after it returns is seen by a later harvest. Pages written before it
    /// count as dirty without the log.
    ///
    /// # Errors
    /// [`DirtyError`] if recording cannot begin; then it has not.
    fn start(&self) -> Result<(), DirtyError>;

    /// Marks in `dirty`, the bits of `region`, the pages written since they were last cleared or, in a log
    /// that needs no clearing, last harvested. Pages already marked stay so. The last harvest is downtime, so
    /// a log of much RAM has all workers [mark parts](DirtyRegion::mark_parts) in parallel.
    ///
    /// # Errors
    /// [`DirtyError`] if the record cannot be read; bits that were consumed are lost, so the attempt ends.
    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError>;

    /// Watches the pages set in `bits` again; they will be read next. `bits` are the words of the pages from
    /// `first_page` on, a multiple of 64, as in `KVM_CLEAR_DIRTY_LOG`. A log that consumes its marks at
    /// harvest has nothing to do.
    ///
    /// # Errors
    /// [`DirtyError`] if the kernel refuses; the attempt ends.
    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError>;

    /// Ends the record, so that the guest runs unwatched. May be called without `start`, and twice.
    ///
    /// # Errors
    /// [`DirtyError`] if the kernel refuses; the guest then runs slower than necessary, but correctly.
    fn stop(&self) -> Result<(), DirtyError>;
}

//! The record of written pages that the engine reads.

use std::fmt::Debug;
use std::time::Instant;

use super::error::DirtyError;
use super::region::DirtyRegion;

/// A record of written pages that can be read while the guest runs.
///
/// Regions are those of the guest's [`GuestRam`](crate::memory::GuestRam), by index from 0. Pages are
/// [`PAGE_BYTES`](crate::memory::PAGE_BYTES) of 4 KiB each, whatever pages the memory is made of, and are
/// numbered from 0 within their region. Bitmaps have one bit a page in words of 64, the first page in bit 0
/// of the first word.
///
/// The engine calls [`start`](Self::start) once, then [`catch_up`](Self::catch_up),
/// [`harvest`](Self::harvest) for each region and [`clear`](Self::clear) for parts of the region, round after
/// round, and [`stop`](Self::stop) if the attempt fails. `harvest` and `clear` are called from several
/// threads at once, for different regions or pages.
///
/// # A log fed by a stream
///
/// The VMM may be another process that names pages in a stream. A thread of this process then reads the
/// stream and marks the pages in a bitmap, such as [`SoftwareBitmap`](super::SoftwareBitmap); `harvest`
/// [takes](super::SoftwareBitmap::take) the marks, and `clear` has nothing to do. Three rules keep every
/// write:
///
/// - The VMM names a page only after it has begun to watch the page again, so that a write after the name is
///   named again; or after the write itself. A page that is named first may be read before the write.
/// - `catch_up` answers [`Fully`](CaughtUp::Fully) only if every write before the call is marked.
/// - Once [`pause`](crate::guest::SourceGuest::pause) and [`save`](crate::guest::SourceGuest::save) have
///   returned, all pages that were written are marked.
///
/// A stream that breaks is an error of the next harvest, [`DirtyError::Vmm`].
pub trait DirtyLog: Send + Sync + Debug {
    /// Begins to record. Every write after it returns is seen by a later harvest. The answer tells which
    /// pages written before it count as dirty without being marked.
    ///
    /// # Errors
    /// [`DirtyError`] if recording cannot begin; then it has not.
    fn start(&self) -> Result<InitiallyDirty, DirtyError>;

    /// Waits until the next harvest has every write that preceded this call; or, in a log that learns of
    /// writes bit by bit, until it has enough to send meanwhile. A log that the kernel keeps is always
    /// [`Fully`](CaughtUp::Fully) there. Waits no longer than a fraction of a second, so that the caller can
    /// look at its limits.
    ///
    /// # Errors
    /// [`DirtyError`] if the record broke; the attempt ends.
    fn catch_up(&self) -> Result<CaughtUp, DirtyError>;

    /// Marks in `dirty`, the bits of `region`, the pages written since they were last cleared or, in a log
    /// that needs no clearing, last harvested. Pages already marked stay so. The last harvest is downtime, so
    /// a log of much RAM has all workers [mark parts](DirtyRegion::mark_parts) in parallel.
    ///
    /// # Errors
    /// [`DirtyError`] if the record cannot be read; bits that were consumed are lost, so the attempt ends.
    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError>;

    /// Watches the pages set in `bits` again; they will be read next, or stay dirty for the engine. `bits`
    /// are the words of the pages from `first_page` on, a multiple of 64, as in `KVM_CLEAR_DIRTY_LOG`. A log
    /// that consumes its marks at harvest has nothing to do.
    ///
    /// # Errors
    /// [`DirtyError`] if the kernel refuses; the attempt ends.
    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError>;

    /// About how many pages the guest has written since the latest harvest and since they were cleared. Takes
    /// nothing: the next harvest marks what it would have marked. Called now and then while pages are sent,
    /// of which `uncleared` have not been [cleared](Self::clear) yet. `None` if the log cannot tell.
    ///
    /// # Errors
    /// [`DirtyError`] if the record cannot be read; the attempt ends.
    fn peek(&self, uncleared: u64) -> Result<Option<u64>, DirtyError> {
        let _ = uncleared;
        Ok(None)
    }

    /// What the operator should know of the latest harvests, such as that more pages count as written than
    /// were. It is shown once, so a log that has said it returns `None`.
    fn warning(&self) -> Option<String> {
        None
    }

    /// Ends the record, so that the guest runs unwatched. May be called without `start`, and twice.
    ///
    /// # Errors
    /// [`DirtyError`] if the kernel refuses; the guest then runs slower than necessary, but correctly.
    fn stop(&self) -> Result<(), DirtyError>;
}

/// Which pages are dirty when a record begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitiallyDirty {
    /// All of them: the log names only later writes.
    All,
    /// None: the log names every page that has to be sent, those written before the start too. A page that it
    /// never names is zero. It may name the last ones while the guest is saved: the engine harvests and sends
    /// meanwhile, from another thread.
    AsNamed,
}

/// How much the next harvest of a log will have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaughtUp {
    /// Every write before the call, except so many pages that the VMM has found written and will name later,
    /// at the latest when it saves the paused guest. They count as dirty.
    Fully {
        /// The number of such pages.
        unnamed_pages: u64,
    },
    /// A part, possibly nothing; the log still has more to name.
    Partly,
    /// Every write of the guest: its VMM has paused it, by itself or as it was asked to. A log that names
    /// pages answers so at once from then on.
    Paused {
        /// Since when.
        since: Instant,
    },
}

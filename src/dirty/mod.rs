//! Which pages changed.
//!
//! A [`DirtyLog`] reports which pages were written since the last time. There are two kinds, and a KVM guest
//! needs both at once: [`KvmLog`] reports what the vCPUs wrote, [`SoftwareLog`] what the VMM and its device
//! threads wrote, which KVM never sees. [`EitherLog`] is their OR.
//!
//! The discipline, without which a write is lost:
//!
//! 1. [`harvest`](DirtyLog::harvest) collects the pages written so far;
//! 2. [`clear`](DirtyLog::clear) watches a page again **before** it is read;
//! 3. only pages that will be read are cleared; the others stay dirty for the next harvest.
//!
//! A write after step 2 is seen by the next harvest; a write before it is in what step 3 reads. Bits that a
//! failed attempt consumed are gone, so every attempt begins with all pages dirty.

mod bitmap;
mod guarded;
mod kvm;
mod part;
mod prefetch;
mod software;
mod stripes;
mod words;

use std::error::Error;
use std::fmt::Debug;
use std::io;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};

pub use bitmap::{DirtyBitmap, DirtyRegion};
pub use kvm::{KvmLog, KvmSlot};
pub use part::DirtyPart;
pub use software::{EitherLog, SoftwareLog, WrittenPages};
pub use sterna_bitmap::SoftwareBitmap;
pub use stripes::{STRIPE_PAGES, Stripe, Stripes};

use crate::error_code::coded;

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
/// stream and marks the pages in a bitmap, as [`SoftwareBitmap`]; `harvest` [takes](SoftwareBitmap::take) the
/// marks, and `clear` has nothing to do. Two rules keep every write:
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

/// Errors of a dirty log.
#[derive(Debug, thiserror::Error, EnumDiscriminants)]
#[strum_discriminants(
    name(DirtyErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum DirtyError {
    /// The kernel refused an ioctl.
    #[error("KVM refused {call} on memory slot {slot}: {error}")]
    Ioctl {
        /// The ioctl's name.
        call: &'static str,
        /// The slot.
        slot: u32,
        /// The kernel's error.
        error: io::Error,
    },
    /// The kernel lacks manual dirty-log protection, or its "initially set" mode.
    #[error(
        "this kernel's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with INITIALLY_SET; Linux 5.7 or newer has it: {0}"
    )]
    NoManualProtect(#[source] io::Error),
    /// KVM refused an operation on its dirty rings, which belong to the VMM.
    #[error("KVM refused an operation on its dirty rings: {0}")]
    Rings(#[source] io::Error),
    /// The VMM's memory slots do not match its guest's RAM.
    #[error(
        "the memory slots are not those of the guest's RAM, region by region in the same order, each of whole 256 KiB save for a region's last; the first wrong one: {slot:?}"
    )]
    Slot {
        /// The first wrong slot; `None` if there are too few.
        slot: Option<u32>,
    },
    /// A memory slot has another size than the VMM claimed.
    #[error(
        "memory slot {slot} has another size than at the start: memory was plugged or unplugged; migrate again"
    )]
    SlotChanged {
        /// Its number.
        slot: u32,
    },
    /// Memory for a copy of KVM's bitmap could not be allocated.
    #[error("no memory for a copy of KVM's dirty bitmap: {0}")]
    NoMemory(#[source] io::Error),
    /// The pages to be read next cannot be read.
    #[error(
        "pages that are to be sent cannot be read: {0}; is their file shorter than it was, or its disk failing?"
    )]
    Unreadable(#[source] io::Error),
    /// The VMM's own dirty log failed.
    #[error("the VMM's record of written pages failed: {0}")]
    Vmm(#[source] Box<dyn Error + Send + Sync>),
    /// The dirty log has no such region, page or length.
    #[error("the dirty log has no pages at {first_page} of region {region} for {words} words")]
    OutOfRange {
        /// Index of the region.
        region: usize,
        /// First page asked for.
        first_page: u64,
        /// Length of the bitmap given, in words of 64 pages.
        words: usize,
    },
}

coded!(DirtyError, DirtyErrorKind, "dirty-log");

impl DirtyError {
    /// Wraps an error of the VMM's own log, or a text.
    pub fn vmm(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Vmm(error.into())
    }
}

//! Why a dirty log failed.

use std::error::Error;
use std::io;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};

use crate::error_code::coded;

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

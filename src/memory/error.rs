use std::io;

use crate::error_code::coded;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

/// Errors of guest RAM, in its description or its addressing.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(MemoryErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum MemoryError {
    /// A RAM region is empty, or does not begin or end on a page.
    #[error("RAM region at {guest_address:#x} with {len_bytes} bytes is not made of whole 4 KiB pages")]
    Unaligned {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// Two RAM regions overlap, or they are not in ascending order.
    #[error("RAM regions overlap or are out of order at {guest_address:#x}")]
    Overlap {
        /// Guest physical address of the later region.
        guest_address: u64,
    },
    /// A guest has no RAM regions, or more than supported.
    #[error("a guest has between 1 and {max} RAM regions, not {count}")]
    RegionCount {
        /// The number of regions.
        count: usize,
        /// The most that are supported.
        max: usize,
    },
    /// A RAM region ends past the end of the address space, or exceeds the address space of this process.
    #[error("RAM region at {guest_address:#x} with {len_bytes} bytes does not fit the address space")]
    TooLarge {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// An access lies outside of guest RAM.
    #[error("pages {first_page}..{first_page}+{pages} are not in RAM region {region}")]
    OutOfRange {
        /// Index of the region.
        region: usize,
        /// First page, counted from the region's start.
        first_page: u64,
        /// Number of pages.
        pages: u64,
    },
    /// The mapping of a RAM region has no host address.
    #[error("RAM region at {guest_address:#x} is not mapped in this process: {reason}")]
    NotMapped {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// The reason that the mapping's owner gave.
        reason: String,
    },
    /// The page size is not a multiple of 4 KiB.
    #[error("guest RAM is made of pages of a multiple of 4 KiB, not of {page_bytes} bytes")]
    PageSize {
        /// The page size given.
        page_bytes: u64,
    },
    /// A RAM region begins or ends within one of its own pages, which may be larger than 4 KiB.
    #[error(
        "RAM region at {guest_address:#x} is not of whole pages: its {what} of {bytes} bytes is no multiple of its page size, \
         {} KiB",
        page_bytes >> 10
    )]
    PartialPage {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Which value is not a multiple.
        what: &'static str,
        /// Its value in bytes.
        bytes: u64,
        /// The size of the region's pages.
        page_bytes: u64,
    },
    /// The file of a RAM region ends before the region does.
    #[error(
        "RAM region at {guest_address:#x} is to be {len_bytes} bytes of a file from byte {offset_bytes} on, and the file has \
         {file_bytes}: make the file as long as its guest's RAM first"
    )]
    FileTooShort {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
        /// The region's offset in the file.
        offset_bytes: u64,
        /// How long the file is.
        file_bytes: u64,
    },
    /// The kernel does not map the file of a RAM region.
    #[error(
        "cannot map the {len_bytes} bytes of RAM region at {guest_address:#x}: {error}; is the file open for reading and \
         writing, and on hugetlbfs, are huge pages of that size free?"
    )]
    Map {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
        /// The kernel's error.
        error: io::Error,
    },
    /// The holes of a RAM region's file cannot be found.
    #[error("cannot find the holes of the guest's memory file: {0}")]
    Holes(#[source] io::Error),
}

coded!(MemoryError, MemoryErrorKind, "memory");

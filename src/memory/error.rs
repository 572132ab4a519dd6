use std::io;

use crate::error_code::coded;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

/// What can be wrong with guest RAM, as described or as addressed.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(MemoryErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region is empty, or does not begin or end on a page.
    #[error("RAM region at {guest_address:#x} with {len_bytes} bytes is not made of whole 4 KiB pages")]
    Unaligned {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// Two regions share addresses, or they are not in ascending order.
    #[error("RAM regions overlap or are out of order at {guest_address:#x}")]
    Overlap {
        /// Guest physical address of the later region.
        guest_address: u64,
    },
    /// There are no regions, or more than a guest can have.
    #[error("a guest has between 1 and {max} RAM regions, not {count}")]
    RegionCount {
        /// How many there were.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A region ends past the end of the address space, or the mapping is too large for this machine.
    #[error("RAM region at {guest_address:#x} with {len_bytes} bytes does not fit the address space")]
    TooLarge {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// An access outside of guest RAM.
    #[error("pages {first_page}..{first_page}+{pages} are not in RAM region {region}")]
    OutOfRange {
        /// Index of the region.
        region: usize,
        /// First page, counted from the region's start.
        first_page: u64,
        /// Number of pages.
        pages: u64,
    },
    /// A region's mapping has no host address.
    #[error("RAM region at {guest_address:#x} is not mapped here: {reason}")]
    NotMapped {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// What the mapping's owner said.
        reason: String,
    },
    /// A page size that no memory has.
    #[error("guest RAM is made of pages of a multiple of 4 KiB, not of {page_bytes} bytes")]
    PageSize {
        /// The page size given.
        page_bytes: u64,
    },
    /// Memory that begins or ends within one of its own pages, which may be larger than 4 KiB.
    #[error(
        "RAM region at {guest_address:#x} is not of whole pages: its {what} of {bytes} bytes is no multiple of its page size, \
         {} KiB",
        page_bytes >> 10
    )]
    PartialPage {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// What is no multiple.
        what: &'static str,
        /// Its value in bytes.
        bytes: u64,
        /// The size of the region's pages.
        page_bytes: u64,
    },
    /// A file that ends before the memory that it is to hold.
    #[error(
        "RAM region at {guest_address:#x} is to be {len_bytes} bytes of a file from byte {offset_bytes} on, and the file has \
         {file_bytes}: make the file as long as its guest's RAM first"
    )]
    FileTooShort {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
        /// Where it begins in the file.
        offset_bytes: u64,
        /// How long the file is.
        file_bytes: u64,
    },
    /// A file that the kernel does not map.
    #[error(
        "cannot map the {len_bytes} bytes of RAM region at {guest_address:#x}: {error}; is the file open for reading and \
         writing, and on hugetlbfs, are huge pages of that size free?"
    )]
    Map {
        /// Guest physical address at which the region begins.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The kernel would not tell where the holes of the backing file are.
    #[error("cannot find the holes of the guest's memory file: {0}")]
    Holes(#[source] io::Error),
}

coded!(MemoryError, MemoryErrorKind, "memory");

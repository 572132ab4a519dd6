//! Flags of the records of RAM: the low bits of a page's offset.

use std::fmt;

/// Bits that are flags and not part of the offset.
pub(crate) const MASK: u64 = 0xfff;
/// A page of zeros.
pub(crate) const ZERO: u64 = 0x02;
/// The table of blocks.
pub(crate) const MEM_SIZE: u64 = 0x04;
/// A page with its bytes.
pub(crate) const PAGE: u64 = 0x08;
/// The section's records end.
pub(crate) const EOS: u64 = 0x10;
/// The page is in the block of the record before, which has the name.
pub(crate) const CONTINUE: u64 = 0x20;
/// All multifd channels flush.
pub(crate) const MULTIFD_FLUSH: u64 = 0x200;

/// QEMU's names, and what must be off if a record has one that cannot be read.
const NAMES: [(u64, &str, &str); 10] = [
    (0x01, "FULL", ""),
    (ZERO, "ZERO", ""),
    (MEM_SIZE, "MEM_SIZE", ""),
    (PAGE, "PAGE", ""),
    (EOS, "EOS", ""),
    (CONTINUE, "CONTINUE", ""),
    (0x40, "XBZRLE", "the capability xbzrle must be off"),
    (0x80, "HOOK", "QEMU's own RDMA cannot be read"),
    (0x100, "COMPRESS_PAGE", "the capability compress must be off"),
    (MULTIFD_FLUSH, "MULTIFD_FLUSH", ""),
];

/// Flags of a record, shown with their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordFlags(pub u64);

impl fmt::Display for RecordFlags {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = || NAMES.iter().filter(|(bit, ..)| self.0 & bit != 0);
        let names: Vec<_> = set().map(|(_, name, _)| *name).collect();
        let names = if names.is_empty() { "no name".to_owned() } else { names.join("|") };
        write!(to, "{:#x} ({names})", self.0)?;
        let remedy = set().map(|(.., remedy)| *remedy).find(|remedy| !remedy.is_empty());
        write!(to, ": {}", remedy.unwrap_or("this version of QEMU is not supported"))
    }
}

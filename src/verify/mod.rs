//! Whether the memory that arrived is the source's: which blocks of RAM have been compared by their digests.
//!
//! A block is 2 MiB, its digest BLAKE3. The source tracks for which blocks the destination has a current
//! digest; the destination keeps the digests. Neither does I/O.
//!
//! - [`Verify::Full`]: the paused source hashes all of RAM, and the destination all of its own once nothing
//!   else can write to it. Equal digests prove that the guest's RAM is the same at both ends when it starts,
//!   whatever the transport, the dirty log or a device did. Its time is downtime.
//! - [`Verify::Final`]: when the remaining pages are few enough for the switch, and the guest still runs,
//!   both ends hash the blocks without a dirty page. Blocks that a later harvest finds written to, and blocks
//!   that were never clean, are hashed while the guest is paused. So each block is compared once after the
//!   last write to it that the log reports. This proves that all of RAM arrived that was written before its
//!   block was hashed, including writes that the log had missed. After that it trusts the dirty log until the
//!   pause. The destination does not read a block again that compared equal while the guest ran, so it misses
//!   a stray write after that; it does read a block again that differed. The downtime limit is held against
//!   the downtime without this comparison; its expected time is reported separately.
//! - [`Verify::Off`]: nothing is hashed. Checksums on the wire (the ICRC of InfiniBand and RoCE, TCP's)
//!   protect the pages that travel; that the right pages travel depends on the correctness of this program.

mod destination_digests;
mod source_digests;

use serde::{Deserialize, Serialize};

pub(crate) use destination_digests::{CheckError, DestinationDigests};
pub(crate) use source_digests::SourceDigests;

/// How much is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Nothing.
    #[default]
    Off,
    /// Every block: as many as possible while the guest runs, and only the others while it is paused.
    Final,
    /// Every block, while the guest is paused.
    Full,
}

/// How many blocks are hashed before their digests are sent: 128 MiB.
pub(crate) const CHUNK_BLOCKS: usize = 64;

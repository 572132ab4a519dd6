//! Whether what arrived is what the source has: which blocks of RAM have been compared by their digests, and which have not.
//!
//! A block is 2 MiB, its digest BLAKE3. The source keeps a digests of the source of them, the destination the digests; neither does I/O.
//!
//! - [`Verify::Full`]: the paused source hashes all of RAM, the destination all of its own once nobody else can write to it. Equal
//!   digests prove that the guest's RAM is the same at both ends when it starts, whatever the transport, the dirty log or a
//!   device did. Its time is downtime.
//! - [`Verify::Final`]: when the rest is small enough for the switch, and the guest still runs, both ends hash the blocks of which
//!   no page is dirty. Of those a later harvest finds written to, and of those that never were clean, the digests are made
//!   anew while the guest is paused. So each block is compared once after the last write to it that the log tells of. It proves
//!   that all of RAM has arrived which was written before its block was hashed, also what the log forgot until then; of the
//!   moment from there to the pause it takes the log's word. At the destination a block that was found equal while the guest
//!   ran is not read again, so a stray write after that is not seen; one that was found different is.
//!   The downtime limit is held against the downtime without this; what is expected of it is told beside.
//! - [`Verify::Off`]: nothing is hashed. Checksums of the wire (the ICRC of InfiniBand and RoCE, TCP's) protect what travels; that
//!   the right pages travel is then this program's word.

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
    /// Every block, as far as that can be while the guest runs, and only the others while it is paused.
    Final,
    /// Every block, while the guest is paused.
    Full,
}

/// How many blocks are hashed before their digests are sent and the next are hashed: 128 MiB.
pub(crate) const CHUNK_BLOCKS: usize = 64;

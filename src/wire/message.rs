//! What is said on the control channel, and how long it may be.

use std::fmt;

use serde::{Deserialize, Serialize};
use sterna_rdma::{Endpoint, RemoteKey};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use super::Token;
use crate::error_code::coded;
use crate::memory::RamLayout;

/// The longest name of a guest, in bytes.
pub const NAME_MAX: usize = 128;
/// The longest name of a file, in bytes: that of Linux.
pub const FILE_NAME_MAX: usize = 255;
/// The longest file that is sent as an image, in bytes: 16 TiB, the longest of ext4.
pub const IMAGE_MAX: u64 = 16 << 40;
/// The most bytes of saved state in one frame: few enough to stay in a processor's second-level cache between the steps of the
/// pipeline, and enough for a system call to cost little beside its copy.
pub const STATE_FRAME_MAX: usize = 256 << 10;
/// The most chunks in one request for keys.
pub const CHUNKS_MAX: usize = 1024;
/// The most digests in one message.
pub const DIGESTS_MAX: usize = 16 << 10;

/// One attempt to migrate. Every attempt has another, so that what is late from an earlier one is known as such.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttemptId(pub [u8; 16]);

impl fmt::Debug for AttemptId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Which lock it is that arbitrates between two hosts: what its file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockToken(pub [u8; 16]);

/// What goes over the control channel. The order of a migration is told in [`source`](crate::source).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: what would come, and how.
    Hello(Hello),
    /// Destination: RAM is reserved and the lanes may connect. For a guest also what a switch will cost there.
    Ready(LaneReady, SwitchCosts),
    /// Destination: not here, for this reason. Nothing has been sent.
    Refused(Refusal),
    /// Source: let these chunks of RAM be written to.
    RegisterChunks(Vec<ChunkRange>),
    /// Destination: the keys for the chunks, in the order asked.
    ChunkKeys(Vec<ChunkKey>),
    /// Source: nothing is on its way to these chunks and nothing more will be, until they are registered anew. Not answered.
    ReleaseChunks(Vec<ChunkRange>),
    /// Source: every lane has fenced this round.
    RoundClosed(u32),
    /// Digests of consecutive blocks of a file.
    Digests(Vec<[u8; 32]>),
    /// Source: the next bytes of the saved state.
    State(StateFrame),
    /// Source: all of the memory and all of the state are sent.
    Final(Final),
    /// Destination: nobody can write here any more, memory and state are in place, and I wait for GO.
    Prepared(AttemptId, Completion),
    /// Source: it is yours. Sent at most once, and after it the source never runs the guest by itself.
    Go(AttemptId),
    /// Destination: it runs here.
    Running(AttemptId),
    /// Destination: the guest's first heartbeat here: its count, and how long after GO it came, in microseconds.
    Alive(AttemptId, u64, u64),
    /// Either side: this attempt is over, for this reason, and the guest is at the source.
    Abort(AttemptId, String),
    /// Source: a file would come instead of a guest, and how. The order of that is told in [`image`](crate::image).
    OfferImage(ImageOffer),
    /// Destination: the file is whole, on its disk and under its name.
    Stored(AttemptId),
    /// Either side: the lanes of this attempt failed while the guest ran, for this reason. The source's word means that what has
    /// arrived counts for nothing, and that another HELLO follows. The destination's awaits that, or the end.
    LanesFailed(AttemptId, String),
    /// Either side, every second: I am alive, also when I have nothing to say.
    Beat,
    /// Source: digests of some blocks of RAM.
    BlockDigests(BlockDigests),
    /// Destination: so many of the blocks that were to be compared at once are equal.
    Checked(u32),
    /// Source, in doubt, on a new connection: what became of this attempt? After [`Outcome::Prepared`] GO or Abort may follow.
    Ask(AttemptId),
    /// Destination: this became of it.
    Outcome(AttemptId, Outcome),
    /// Source: RUNNING was heard and recorded, so nobody will ask about this attempt.
    Done(AttemptId),
}

/// What a destination has on record of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All is in place, and GO is awaited.
    Prepared,
    /// The guest runs, or has run, here.
    Running,
    /// It did not run here, and never will.
    Refused,
    /// There is no record of it. That proves nothing.
    Unknown,
}

/// The opening of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// This attempt.
    pub attempt_id: AttemptId,
    /// The guest's name.
    pub name: String,
    /// Its RAM.
    pub ram: RamLayout,
    /// What the destination's VMM needs to make the same machine, in the VMM's own format.
    #[serde(with = "serde_bytes")]
    pub details: Vec<u8>,
    /// How the pages would travel.
    pub lanes: LaneOffer,
    /// The lock that the source holds, and whoever runs the guest must hold.
    pub lock: Option<LockToken>,
    /// How long the saved state is expected to be: for this the destination has memory ready when it comes, within its own limit.
    pub state_bytes: u64,
}

/// The opening of the transfer of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// This attempt.
    pub attempt_id: AttemptId,
    /// The file's name, of one component. The destination need not follow it.
    pub name: String,
    /// The file's length.
    pub len_bytes: u64,
    /// How much of it is data and no hole.
    pub data_bytes: u64,
    /// What would travel; `None` of a file that is empty or one hole.
    pub content: Option<ImageContent>,
}

/// The parts of a file that hold data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageContent {
    /// Where they are, as if the file were RAM: a guest address is a place in the file. What lies between them is a hole.
    pub parts: RamLayout,
    /// How the pages would travel.
    pub lanes: LaneOffer,
}

/// How the source means to send pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaneOffer {
    /// So many TCP connections.
    Tcp(u8),
    /// Queue pairs, one a lane.
    Rdma {
        /// The source's ends.
        endpoints: Vec<Endpoint>,
        /// Whether a device that lacks the address of the control channel will do: RDMA was asked for by name.
        any_device: bool,
    },
}

/// What the destination has made for the lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaneReady {
    /// Connections that show this token are expected, on the address of the control channel.
    Tcp(Token),
    /// Queue pairs, one a lane.
    Rdma {
        /// The destination's ends, connected to those offered, in the same order.
        endpoints: Vec<Endpoint>,
        /// How much RAM the destination can have registered at once; `None` if all of it.
        pin_max_bytes: Option<u64>,
    },
}

/// A part of a RAM region that is registered as a whole. In the order of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkRange {
    /// Index of the region.
    pub region: u16,
    /// First page, counted from the region's start.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

/// What it takes to write into a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkKey {
    /// The address of its first byte, in the destination's terms.
    pub address: u64,
    /// The key of its memory region.
    pub key: RemoteKey,
}

/// The end of the transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// This attempt.
    pub attempt_id: AttemptId,
    /// The last round; its fence is on every lane.
    pub round: u32,
    /// How many blocks there are digests of, to be compared; none at all, or all.
    pub compare_blocks: u64,
    /// The length of the saved state, all of which was sent before.
    pub state_bytes: u64,
}

/// A part of the saved state of vCPUs and devices, in the VMM's own format. Every frame but the last has [`STATE_FRAME_MAX`] bytes.
///
/// In a frame of the control channel the bytes come first and the offset behind them, so that neither end copies them to encode or
/// decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFrame {
    /// Where in the state the bytes begin.
    pub offset: u64,
    /// The bytes, at least one.
    pub bytes: Vec<u8>,
}

/// Digests of blocks of RAM, in any order; the last of a block counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigests {
    /// Whether the destination compares them at once, and answers, rather than after it has taken remote access away.
    pub now: bool,
    /// The digests.
    pub digests: Vec<BlockDigest>,
}

/// The digest of one block of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigest {
    /// Which, counted through all of RAM.
    pub block: u32,
    /// BLAKE3 of its 2 MiB.
    pub digest: [u8; 32],
}

/// What a destination can say of a switch before there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchCosts {
    /// How long a record takes there, in microseconds: two fall into the switch.
    pub record_us: u64,
    /// How long taking remote access away takes, in microseconds.
    pub revoke_us: u64,
    /// The longest saved state that it takes, in bytes.
    pub state_max_bytes: u64,
}

/// What the destination did between FINAL and PREPARED.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// Pages whose digests were compared and found equal.
    pub verified_pages: u64,
    /// How long taking remote access away took, in microseconds.
    pub revoke_us: u64,
    /// How long comparing took.
    pub verify_us: u64,
    /// How long loading the state took.
    pub load_us: u64,
}

/// Why a destination does not take a guest.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize, EnumDiscriminants)]
#[strum_discriminants(
    name(RefusalKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
pub enum Refusal {
    /// Not enough memory.
    #[error(
        "the destination has {} MiB of memory available and the guest needs {} MiB",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Memory {
        /// What the guest needs.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// A guest of that name is there.
    #[error("a guest named {0} is at the destination already")]
    NameTaken(String),
    /// The destination cannot make this machine.
    #[error("the destination cannot run this guest: {0}")]
    Incompatible(String),
    /// The destination cannot carry the pages in the way offered.
    #[error("the destination cannot receive this way: {0}")]
    Transport(String),
    /// A file was offered where guests are awaited.
    #[error("the destination receives guests and no files")]
    OnlyGuests,
    /// A guest was offered where a file is awaited.
    #[error("the destination receives files and no guests")]
    OnlyImages,
    /// A file of that name is there.
    #[error("{0} exists at the destination")]
    FileExists(String),
    /// Not enough room for a file.
    #[error(
        "the file system at the destination has {} MiB free and the file needs {} MiB",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Space {
        /// What the file needs.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// The destination cannot store this file.
    #[error("the destination cannot store this file: {0}")]
    Image(String),
    /// Another guest is on its way there.
    #[error("another guest is arriving at the destination")]
    Busy,
    /// The destination could not remember what it does with the guest.
    #[error("the destination cannot record what becomes of the guest: {0}")]
    State(String),
    /// The guest has a lock, and the destination none.
    #[error("the source holds a lock for this guest and the destination has none")]
    LockMissing,
    /// The destination has a lock, and the guest none.
    #[error("the destination has a lock and the guest runs without one at the source")]
    LockUnknown,
    /// The two have no lock in common that would arbitrate between them.
    #[error("the destination cannot use its lock: {0}")]
    Lock(String),
}

coded!(Refusal, RefusalKind, "refused");

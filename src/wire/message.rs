//! The messages of the control channel, and their bounds.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use super::text::escaped;
use crate::error_code::coded;
use crate::memory::RamLayout;

/// The longest name of a guest, in bytes.
pub const NAME_MAX: usize = 128;
/// The longest name of a file, in bytes: the limit of Linux.
pub const FILE_NAME_MAX: usize = 255;
/// The longest file that is sent as an image, in bytes: 16 TiB, the limit of ext4.
pub const IMAGE_MAX: u64 = 16 << 40;
/// The most bytes of saved state in one frame: few enough to stay in a processor's second-level cache between
/// the steps of the pipeline, and enough to make a system call cheap compared to the copy.
pub const STATE_FRAME_MAX: usize = 256 << 10;
/// The most lanes that a migration has.
pub const LANES_MAX: u8 = 64;
/// The longest name of a transport, in bytes.
pub const SCHEME_MAX: usize = 32;
/// The longest description of the lanes' ends in HELLO and READY, in bytes.
pub const LANE_BODY_MAX: usize = 8 << 10;
/// The longest request of a transport beside its lanes, or answer to one, in bytes.
pub const TRANSPORT_BODY_MAX: usize = 32 << 10;
/// The most digests in one message.
pub const DIGESTS_MAX: usize = 16 << 10;

/// The identity of one attempt to migrate. Each attempt has its own, so that late messages of an earlier
/// attempt are recognised.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttemptId(pub [u8; 16]);

impl fmt::Debug for AttemptId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// The identity of the lock that arbitrates between two hosts: the content of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockToken(pub [u8; 16]);

/// A message of the control channel. [`source`](crate::source) documents the order of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: the guest offered, and how its pages would travel.
    Hello(Hello),
    /// Destination: RAM is reserved and the lanes may connect. For a guest also the costs of a switch at the
    /// destination.
    Ready(LaneReady, SwitchCosts),
    /// Destination: refused, for this reason. Nothing has been sent.
    Refused(Refusal),
    /// Source: a request of its transport. Destination: the answer to one. Only the transport reads the body.
    Transport(Vec<u8>),
    /// Source: every lane has fenced this round.
    RoundClosed(u32),
    /// Digests of consecutive blocks of a file.
    Digests(Vec<[u8; 32]>),
    /// Source: the next bytes of the saved state.
    State(StateFrame),
    /// Source: all memory and all state are sent.
    Final(Final),
    /// Destination: no other process can write to the memory, memory and state are in place, and GO is
    /// awaited.
    Prepared(AttemptId, Completion),
    /// Source: the destination may run the guest. Sent at most once; after it the source never resumes the
    /// guest on its own.
    Go(AttemptId),
    /// Destination: the guest runs at the destination.
    Running(AttemptId),
    /// Destination: the guest's first heartbeat at the destination: its count, and its delay after GO in
    /// microseconds.
    Alive(AttemptId, u64, u64),
    /// Either side: this attempt is over, for this reason, and the guest is at the source.
    Abort(AttemptId, String),
    /// Source: a file offered instead of a guest, and how it would travel. [`image`](crate::image) documents
    /// the order.
    OfferImage(ImageOffer),
    /// Destination: the file is complete, on disk and under its name.
    Stored(AttemptId),
    /// Either side: the lanes of this attempt failed while the guest ran, for this reason. From the source it
    /// also voids everything that has arrived, and another HELLO follows. The destination then awaits that
    /// HELLO, or the end.
    LanesFailed(AttemptId, String),
    /// Either side, every second: a keepalive.
    Beat,
    /// Source: digests of some blocks of RAM.
    BlockDigests(BlockDigests),
    /// Destination: how many of the blocks that were to be compared at once are equal.
    Checked(u32),
    /// Source, in doubt, on a new connection: what is the outcome of this attempt? After
    /// [`Outcome::Prepared`] GO or Abort may follow.
    Ask(AttemptId),
    /// Destination: the outcome of an attempt.
    Outcome(AttemptId, Outcome),
    /// Source: RUNNING arrived and is recorded, so the source will not ask about this attempt.
    Done(AttemptId),
}

/// The outcome of an attempt by the destination's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Memory and state are in place, and GO is awaited.
    Prepared,
    /// The guest runs, or has run, at the destination.
    Running,
    /// The guest did not run at the destination, and never will.
    Refused,
    /// No record of the attempt. That proves nothing.
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
    /// What the destination's VMM needs to build the same machine, in the VMM's own format.
    #[serde(with = "serde_bytes")]
    pub details: Vec<u8>,
    /// How the pages would travel.
    pub lanes: LaneOffer,
    /// The lock that the source holds, and that any host must hold to run the guest.
    pub lock: Option<LockToken>,
    /// The expected length of the saved state: the destination allocates memory for this much in advance,
    /// within its own limit.
    pub state_bytes: u64,
}

/// The opening of the transfer of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// This attempt.
    pub attempt_id: AttemptId,
    /// The file's name, a single component, with any bytes that a name may have. The destination may choose
    /// another.
    pub name: String,
    /// The file's length.
    pub len_bytes: u64,
    /// How many of its bytes are data rather than holes.
    pub data_bytes: u64,
    /// The data to travel; `None` for a file that is empty or a single hole.
    pub content: Option<ImageContent>,
}

/// The parts of a file that hold data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageContent {
    /// Where they are, as if the file were RAM: a guest address is an offset in the file. The ranges in
    /// between are holes.
    pub parts: RamLayout,
    /// How the pages would travel.
    pub lanes: LaneOffer,
}

/// How the source proposes to send pages. `Debug` output hides the body, which may hold keys.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneOffer {
    /// The transport's name, such as `rdma`: lower-case letters, digits and `-`, at most [`SCHEME_MAX`]
    /// bytes.
    pub scheme: String,
    /// How many lanes, at least one and at most [`LANES_MAX`].
    pub lanes: u8,
    /// What the destination's end of that transport must know, at most [`LANE_BODY_MAX`] bytes. Only the
    /// transport reads it.
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

impl fmt::Debug for LaneOffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "LaneOffer({} lanes of {})", self.lanes, self.scheme.escape_debug())
    }
}

/// The destination's ends of the lanes. `Debug` output hides the body, which may hold keys.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneReady {
    /// What the source's end of the transport must know to connect, at most [`LANE_BODY_MAX`] bytes.
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

impl fmt::Debug for LaneReady {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("LaneReady(…)")
    }
}

/// The end of the transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// This attempt.
    pub attempt_id: AttemptId,
    /// The last round; its fence is on every lane.
    pub round: u32,
    /// How many blocks have digests to be compared: none or all.
    pub compare_blocks: u64,
    /// The length of the saved state, all of which was sent before.
    pub state_bytes: u64,
}

/// A part of the saved state of vCPUs and devices, in the VMM's own format. Every frame but the last has
/// [`STATE_FRAME_MAX`] bytes.
///
/// In a frame of the control channel the offset follows the bytes, so that neither end copies them to encode
/// or decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFrame {
    /// The offset of the bytes in the state.
    pub offset: u64,
    /// The bytes, at least one.
    pub bytes: Vec<u8>,
}

/// Digests of blocks of RAM, in any order; the last of a block counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigests {
    /// Whether the destination compares the blocks at once and answers, rather than after it has revoked
    /// remote access.
    pub now: bool,
    /// The digests.
    pub digests: Vec<BlockDigest>,
}

/// The digest of one block of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigest {
    /// The block's index, counted through all of RAM.
    pub block: u32,
    /// BLAKE3 of its 2 MiB.
    pub digest: [u8; 32],
}

/// The costs of a switch that the destination knows before the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchCosts {
    /// How long a record takes at the destination, in microseconds: two records are part of the switch.
    pub record_us: u64,
    /// How long revoking remote access takes, in microseconds.
    pub revoke_us: u64,
    /// The longest saved state that the destination accepts, in bytes.
    pub state_max_bytes: u64,
}

/// The destination's work between FINAL and PREPARED.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// Pages with digests that compared equal.
    pub verified_pages: u64,
    /// How long revoking remote access took, in microseconds.
    pub revoke_us: u64,
    /// How long comparing took, in microseconds.
    pub verify_us: u64,
    /// How long loading the state took, in microseconds.
    pub load_us: u64,
}

/// Why a destination refuses a guest or a file.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize, EnumDiscriminants)]
#[strum_discriminants(
    name(RefusalKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
pub enum Refusal {
    /// The destination has too little memory available for the guest.
    #[error(
        "the destination has {} MiB of memory available and the guest needs {} MiB",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Memory {
        /// Bytes that the guest needs.
        needed_bytes: u64,
        /// Bytes that are available.
        available_bytes: u64,
    },
    /// The destination already has a guest with that name.
    #[error("a guest named {0} is at the destination already")]
    NameTaken(#[serde(deserialize_with = "escaped")] String),
    /// The destination cannot build this machine.
    #[error("the destination cannot run this guest: {0}")]
    Incompatible(#[serde(deserialize_with = "escaped")] String),
    /// The destination supports none of the offered ways to carry pages.
    #[error("the destination cannot receive this way: {0}")]
    Transport(#[serde(deserialize_with = "escaped")] String),
    /// A file was offered to a destination that receives guests.
    #[error("the destination receives guests and no files")]
    OnlyGuests,
    /// A guest was offered to a destination that receives files.
    #[error("the destination receives files and no guests")]
    OnlyImages,
    /// The destination already has a file with that name.
    #[error("{0} exists at the destination")]
    FileExists(#[serde(deserialize_with = "escaped")] String),
    /// The destination's file system has too little space for the file.
    #[error(
        "the file system at the destination has {} MiB free and the file needs {} MiB",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Space {
        /// Bytes that the file needs.
        needed_bytes: u64,
        /// Bytes that are free.
        available_bytes: u64,
    },
    /// The destination cannot store this file.
    #[error("the destination cannot store this file: {0}")]
    Image(#[serde(deserialize_with = "escaped")] String),
    /// Another guest is arriving at the destination.
    #[error("another guest is arriving at the destination")]
    Busy,
    /// The destination cannot record the state of the guest.
    #[error("the destination cannot record what becomes of the guest: {0}")]
    State(#[serde(deserialize_with = "escaped")] String),
    /// The source holds a lock for the guest, and the destination has none.
    #[error("the source holds a lock for this guest and the destination has none")]
    LockMissing,
    /// The destination has a lock, and the source runs the guest without one.
    #[error("the destination has a lock and the guest runs without one at the source")]
    LockUnknown,
    /// The two hosts have no common lock that could arbitrate between them.
    #[error("the destination cannot use its lock: {0}")]
    Lock(#[serde(deserialize_with = "escaped")] String),
    /// The destination trusts the source's host, but not for this.
    #[error("the destination trusts this host, but its list does not let this host do that")]
    NotAllowed,
    /// The attempt was begun by another host than the one that asks or answers.
    #[error("the attempt belongs to another host than this one")]
    OtherHost,
}

coded!(Refusal, RefusalKind, "refused");

//! What two hosts say to each other, as data: no socket is touched here and no clock is read.
//!
//! Every connection opens with a [`Preamble`] of fixed form, which no version will change, so that a peer of another
//! version, or something that is not Sterna at all, is told apart before anything else is believed. The control connection
//! then carries [`Message`]s, each in a frame with its kind, length and digest; the length is checked against the bound of that
//! kind before anything is allocated, the digest before anything is decoded. Data lanes over TCP carry [frames of pages](PageFrame) instead.

mod codec;
mod frame;
mod message;
mod pages;
mod preamble;

use crate::error_code::coded;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

pub use frame::{FRAME_HEAD_LEN, FrameHead};
pub use message::{
    AttemptId, BlockDigest, BlockDigests, CHUNKS_MAX, ChunkKey, ChunkRange, Completion, DIGESTS_MAX,
    FILE_NAME_MAX, Final, Hello, IMAGE_MAX, ImageContent, ImageOffer, LaneOffer, LaneReady, LockToken,
    Message, NAME_MAX, Outcome, Refusal, STATE_FRAME_MAX, StateFrame, SwitchCosts,
};
pub use pages::{FRAME_BYTES_MAX, PageFrame, RUN_LEN, RUNS_MAX, WireRun};
pub use preamble::{PREAMBLE_LEN, PROTOCOL_VERSION, Preamble, Role, Token};

/// What is wrong with bytes that a peer sent.
#[derive(Clone, Debug, Error, PartialEq, Eq, EnumDiscriminants)]
#[strum_discriminants(
    name(WireErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum WireError {
    /// Not a Sterna peer.
    #[error("the peer does not speak Sterna's protocol")]
    NotSterna,
    /// A Sterna peer of another protocol version.
    #[error("the peer speaks protocol version {theirs}, this side version {ours}")]
    Version {
        /// This side's version.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// A preamble with a role that does not exist.
    #[error("the peer opened a connection of unknown role {0}")]
    Role(u8),
    /// A message that is not what was sent.
    #[error(
        "a message was damaged on its way, which neither the network nor TCP noticed: is a network card or a memory bank failing?"
    )]
    Damaged,
    /// A message of unknown kind.
    #[error("the peer sent a message of unknown kind {0}")]
    Kind(u16),
    /// A message, or a list in one, that is longer than its kind may be.
    #[error("the peer sent {what} of {len}, more than the {max} allowed")]
    TooLong {
        /// What was too long.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// A message whose bytes do not decode to what its kind says.
    #[error("the peer sent a malformed {0}")]
    Malformed(&'static str),
}

coded!(WireError, WireErrorKind, "protocol");

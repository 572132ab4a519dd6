//! The protocol between two hosts, as data: this module uses no socket and no clock.
//!
//! Every connection opens with a [`Preamble`] of fixed form, which no version will change. So a peer of
//! another version, or one that is not Sterna at all, is recognised before anything else is believed. The
//! control connection then carries [`Message`]s, each in a frame with its kind, length and digest. The length
//! is checked against the bound of the kind before anything is allocated, and the digest before anything is
//! decoded. Data lanes over TCP carry [frames of pages](PageFrame) instead.

mod codec;
mod frame;
mod message;
mod pages;
mod preamble;
mod text;

use crate::error_code::coded;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

#[cfg(test)]
pub(crate) use codec::tests::one_of_each;
pub use frame::{FRAME_HEAD_LEN, FrameHead};
pub use message::{
    AttemptId, BlockDigest, BlockDigests, Completion, DIGESTS_MAX, FILE_NAME_MAX, Final, Hello, IMAGE_MAX,
    ImageContent, ImageOffer, LANE_BODY_MAX, LANES_MAX, LaneOffer, LaneReady, LockToken, Message, NAME_MAX,
    Outcome, Refusal, SCHEME_MAX, STATE_FRAME_MAX, StateFrame, SwitchCosts, TRANSPORT_BODY_MAX,
};
pub use pages::{FRAME_BYTES_MAX, PageFrame, RUN_LEN, RUNS_MAX, WireRun};
pub use preamble::{
    LANE_OPENING_LEN, LaneOpening, PREAMBLE_LEN, PROTOCOL_VERSION, Preamble, Protection, Role, Token,
};

/// Errors in bytes that a peer sent.
#[derive(Clone, Debug, Error, PartialEq, Eq, EnumDiscriminants)]
#[strum_discriminants(
    name(WireErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum WireError {
    /// The peer does not speak Sterna's protocol.
    #[error("the peer does not speak Sterna's protocol")]
    NotSterna,
    /// The peer speaks another version of Sterna's protocol.
    #[error("the peer speaks protocol version {theirs}, this side version {ours}")]
    Version {
        /// This side's version.
        ours: u16,
        /// The peer's version.
        theirs: u16,
    },
    /// The peer opened a connection with an unknown role.
    #[error("the peer opened a connection of unknown role {0}")]
    Role(u8),
    /// The peer asked for a kind of protection that does not exist.
    #[error("the peer asked for protection of unknown kind {0}")]
    Protection(u8),
    /// A message was damaged on its way.
    #[error(
        "a message was damaged on its way, which neither the network nor TCP noticed: is a network card or a memory bank failing?"
    )]
    Damaged,
    /// The peer sent a message of unknown kind.
    #[error("the peer sent a message of unknown kind {0}")]
    Kind(u16),
    /// The peer sent a message, or a list in one, that is longer than its kind allows.
    #[error("the peer sent {what} of {len}, more than the {max} allowed")]
    TooLong {
        /// What was too long.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// The peer sent a message with a body that does not decode as its kind.
    #[error("the peer sent a malformed {0}")]
    Malformed(&'static str),
}

coded!(WireError, WireErrorKind, "protocol");

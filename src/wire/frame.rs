use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of a [`FrameHead`] in bytes.
pub const FRAME_HEAD_LEN: usize = size_of::<FrameHead>();

/// The head of a frame on the control channel; the message's body follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHead {
    /// The kind of the message, see [`Message::kind`](super::Message::kind).
    pub kind: U16,
    reserved: U16,
    /// Length of the body in bytes.
    pub body_len: U32,
}

impl FrameHead {
    /// The head of a message's frame.
    #[must_use]
    pub fn new(kind: u16, body_len: u32) -> Self {
        Self { kind: kind.into(), reserved: 0.into(), body_len: body_len.into() }
    }
}

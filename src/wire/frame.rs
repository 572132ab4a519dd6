use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// Length of a [`FrameHead`] in bytes.
pub const FRAME_HEAD_LEN: usize = size_of::<FrameHead>();

/// The head of a frame on the control channel; the message's body follows.
///
/// TCP's own checksum has 16 bits, and every device that rewrites headers on the way computes it anew; saved
/// state damaged in such a device would be loaded. The digest does not protect against an attacker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHead {
    /// The kind of the message, see [`Message::kind`](super::Message::kind).
    pub kind: U16,
    reserved: U16,
    /// Length of the body in bytes.
    pub body_len: U32,
    /// The first bytes of BLAKE3 of the fields before it and of the body.
    pub digest: [u8; 8],
}

impl FrameHead {
    /// The head of a message's frame.
    ///
    /// # Errors
    /// [`WireError::Malformed`] if the body is longer than 4 GiB.
    pub fn new(kind: u16, body: &[u8]) -> Result<Self, WireError> {
        let body_len = u32::try_from(body.len()).map_err(|_| WireError::Malformed("message"))?;
        let mut head =
            Self { kind: kind.into(), reserved: 0.into(), body_len: body_len.into(), digest: [0; 8] };
        head.digest = head.digest_with(body);
        Ok(head)
    }

    /// Checks that this head and this body are those that the peer sent.
    ///
    /// # Errors
    /// [`WireError::Damaged`].
    pub fn check(&self, body: &[u8]) -> Result<(), WireError> {
        if self.digest == self.digest_with(body) { Ok(()) } else { Err(WireError::Damaged) }
    }

    fn digest_with(&self, body: &[u8]) -> [u8; 8] {
        let mut digest = [0; 8];
        let mut hasher = blake3::Hasher::new();
        hasher.update(Self { digest, ..*self }.as_bytes()).update(body);
        digest.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_that_flips_anywhere_is_noticed() {
        let body = *b"the state of a guest";
        let head = FrameHead::new(8, &body).unwrap();
        head.check(&body).unwrap();
        for bit in 0..8 * FRAME_HEAD_LEN {
            let mut bytes = [0; FRAME_HEAD_LEN];
            bytes.copy_from_slice(head.as_bytes());
            bytes[bit / 8] ^= 1 << (bit % 8);
            let damaged = FrameHead::read_from_bytes(&bytes).unwrap();
            assert_eq!(damaged.check(&body), Err(WireError::Damaged), "bit {bit} of the head");
        }
        for bit in 0..8 * body.len() {
            let mut damaged = body;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(head.check(&damaged), Err(WireError::Damaged), "bit {bit} of the body");
        }
    }
}

use std::fmt;

use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// The version of everything that follows the preamble. A peer of another version is refused with both
/// versions named.
pub const PROTOCOL_VERSION: u16 = 6;

/// Length of a preamble in bytes, in every version.
pub const PREAMBLE_LEN: usize = size_of::<Raw>();

const MAGIC: [u8; 8] = *b"STERNA\r\n";

/// A secret of one migration attempt: a data connection shows it to prove that it belongs to the attempt.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Hash)]
pub struct Token(pub [u8; 16]);

impl Token {
    /// The token of a control connection, which has none yet.
    pub const NONE: Self = Self([0; 16]);
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(..)")
    }
}

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The control channel of a migration.
    Control,
    /// A TCP data lane, by index.
    Lane(u8),
}

/// The first bytes on every connection, from the side that opened it; on a control connection the other side
/// answers with its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The purpose of the connection.
    pub role: Role,
    /// The migration that it belongs to.
    pub token: Token,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    role: u8,
    lane: u8,
    token: [u8; 16],
    reserved: [u8; 4],
}

impl Preamble {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let (role, lane) = match self.role {
            Role::Control => (0, 0),
            Role::Lane(lane) => (1, lane),
        };
        let raw = Raw {
            magic: MAGIC,
            version: PROTOCOL_VERSION.into(),
            role,
            lane,
            token: self.token.0,
            reserved: [0; 4],
        };
        zerocopy::transmute!(raw)
    }

    /// Reads a peer's preamble.
    ///
    /// # Errors
    /// [`WireError::NotSterna`], then [`WireError::Version`], then [`WireError::Role`].
    pub fn decode(bytes: [u8; PREAMBLE_LEN]) -> Result<Self, WireError> {
        let raw: Raw = zerocopy::transmute!(bytes);
        if raw.magic != MAGIC {
            return Err(WireError::NotSterna);
        }
        if raw.version.get() != PROTOCOL_VERSION {
            return Err(WireError::Version { ours: PROTOCOL_VERSION, theirs: raw.version.get() });
        }
        let role = match raw.role {
            0 => Role::Control,
            1 => Role::Lane(raw.lane),
            other => return Err(WireError::Role(other)),
        };
        Ok(Self { role, token: Token(raw.token) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preamble_comes_back_as_it_was() {
        for role in [Role::Control, Role::Lane(7)] {
            let preamble = Preamble { role, token: Token([9; 16]) };
            assert_eq!(Preamble::decode(preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        let good = Preamble { role: Role::Control, token: Token::NONE }.encode();
        let mut other = good;
        other[0] = b'H';
        assert_eq!(Preamble::decode(other), Err(WireError::NotSterna));
        let mut other = good;
        other[8] = 9;
        assert_eq!(Preamble::decode(other), Err(WireError::Version { ours: PROTOCOL_VERSION, theirs: 9 }));
        let mut other = good;
        other[10] = 2;
        assert_eq!(Preamble::decode(other), Err(WireError::Role(2)));
    }
}

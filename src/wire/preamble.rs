use std::fmt;

use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// The version of everything that follows the preamble. A peer that speaks only other versions is refused
/// with both named.
pub const PROTOCOL_VERSION: u16 = 7;

/// The oldest version that this side speaks, too.
const PROTOCOL_OLDEST: u16 = 7;

/// Length of a preamble in bytes, in every version.
pub const PREAMBLE_LEN: usize = size_of::<Raw>();

const MAGIC: [u8; 8] = *b"STERNA\r\n";

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The control channel of a migration.
    Control,
    /// A TCP data lane.
    Lane,
}

/// What protects a connection after the preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    Plain,
    /// TLS 1.3, by which each side proves its key.
    Tls,
}

/// The first bytes on every connection, from the side that opened it; on a control connection the other side
/// answers with its own, which says how it goes on or what it asks for.
///
/// It crosses the network unprotected, so it says nothing about guests or hosts. On a connection with TLS
/// each side repeats it within TLS, which shows a change on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The purpose of the connection.
    pub role: Role,
    /// What protects all that follows.
    pub protection: Protection,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    role: u8,
    protection: u8,
    oldest: U16,
    reserved: [u8; 18],
}

impl Preamble {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let raw = Raw {
            magic: MAGIC,
            version: PROTOCOL_VERSION.into(),
            role: match self.role {
                Role::Control => 0,
                Role::Lane => 1,
            },
            protection: match self.protection {
                Protection::Plain => 0,
                Protection::Tls => 1,
            },
            oldest: PROTOCOL_OLDEST.into(),
            reserved: [0; 18],
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
        // Up to version 6 a peer spoke one version, and these bytes were zeros.
        let newest = raw.version.get();
        let oldest = if raw.oldest.get() == 0 { newest } else { raw.oldest.get() };
        if newest < PROTOCOL_OLDEST || oldest > PROTOCOL_VERSION {
            return Err(WireError::Version { ours: PROTOCOL_VERSION, theirs: newest });
        }
        let role = match raw.role {
            0 => Role::Control,
            1 => Role::Lane,
            other => return Err(WireError::Role(other)),
        };
        let protection = match raw.protection {
            0 => Protection::Plain,
            1 => Protection::Tls,
            other => return Err(WireError::Protection(other)),
        };
        Ok(Self { role, protection })
    }
}

/// A secret of one migration attempt: a data connection shows it to prove that it belongs to the attempt.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Hash)]
pub struct Token(pub [u8; 16]);

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(..)")
    }
}

/// Length of the opening of a lane in bytes.
pub const LANE_OPENING_LEN: usize = size_of::<LaneOpening>();

/// What a data connection says first after the preamble, within TLS if it has TLS.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LaneOpening {
    token: [u8; 16],
    /// The lane, by index.
    pub lane: u8,
    reserved: [u8; 3],
}

impl LaneOpening {
    /// The opening of a lane of the attempt with this token.
    #[must_use]
    pub fn new(token: Token, lane: u8) -> Self {
        Self { token: token.0, lane, reserved: [0; 3] }
    }

    /// The token that the lane shows.
    #[must_use]
    pub fn token(&self) -> Token {
        Token(self.token)
    }
}

impl fmt::Debug for LaneOpening {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("LaneOpening").field("lane", &self.lane).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preamble_comes_back_as_it_was() {
        for role in [Role::Control, Role::Lane] {
            for protection in [Protection::Plain, Protection::Tls] {
                let preamble = Preamble { role, protection };
                assert_eq!(Preamble::decode(preamble.encode()), Ok(preamble));
            }
        }
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        let good = Preamble { role: Role::Control, protection: Protection::Plain }.encode();
        let changed = |at: usize, byte: u8| {
            let mut other = good;
            other[at] = byte;
            Preamble::decode(other)
        };
        assert_eq!(changed(0, b'H'), Err(WireError::NotSterna));
        for theirs in [6, 9] {
            let mut other = good;
            (other[8], other[12]) = (theirs, theirs);
            let theirs = theirs.into();
            let expected = Err(WireError::Version { ours: PROTOCOL_VERSION, theirs });
            assert_eq!(Preamble::decode(other), expected);
            (other[12], other[13]) = (0, 0);
            assert_eq!(Preamble::decode(other), expected);
        }
        assert!(changed(8, 9).is_ok(), "a newer peer that speaks this version, too");
        assert_eq!(changed(10, 2), Err(WireError::Role(2)));
        assert_eq!(changed(11, 2), Err(WireError::Protection(2)));
    }

    #[test]
    fn an_opening_of_a_lane_that_is_printed_shows_no_token() {
        let opening = LaneOpening::new(Token([0xab; 16]), 3);
        assert_eq!(opening.token(), Token([0xab; 16]));
        assert_eq!(format!("{:?}", opening.token()), "Token(..)");
        assert_eq!(format!("{opening:?}"), "LaneOpening { lane: 3, .. }");
    }
}

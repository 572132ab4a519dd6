//! The digest by which both ends compare an image.

use std::fmt;

/// The digest of an image's content: the BLAKE3 hash of its length (64 bits, little-endian) and of the BLAKE3
/// hashes of its 2 MiB blocks in order, the last padded with zeros to a whole page. Holes and written zeros
/// are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageDigest(pub [u8; 32]);

impl fmt::Display for ImageDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

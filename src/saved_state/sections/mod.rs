//! A saved state as named sections, written and read as a stream.
//!
//! ```text
//! state   = section… 0x00
//! section = name length (1 byte, 1 to 64), name (UTF-8), chunk…, 0x00000000
//! chunk   = length (4 bytes, little-endian, 1 to 1 MiB), bytes
//! ```
//!
//! A section's length is not known before its end, so the VMM need not have its state in one piece. Neither
//! side copies anything longer than a buffer of 16 KiB. A state comes from a peer: every length is checked,
//! and only a name is kept in memory.

mod reader;
mod writer;

use std::io;

use crate::error_code::coded;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

pub use reader::{SectionReader, StateReader};
pub use writer::{SectionWriter, StateWriter};

/// The longest name of a section, in bytes.
pub const SECTION_NAME_MAX: usize = 64;

/// The longest chunk, in bytes.
const CHUNK_MAX: usize = 1 << 20;

/// Why a saved state is not what its reader expects. Names are escaped where they are shown.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(SectionErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SectionError {
    /// The next section has another name, or the state ends.
    #[error(
        "the saved state has {} where section {wanted:?} was due: do both hosts run the same version of the VMM?",
        got.as_ref().map_or("its end".to_owned(), |got| format!("section {got:?}"))
    )]
    Missing {
        /// The section that was due.
        wanted: String,
        /// The section that is next; `None` at the end of the state.
        got: Option<String>,
    },
    /// The reader does not know this section.
    #[error(
        "the saved state has section {0:?}, which this VMM does not know: do both hosts run the same version of it?"
    )]
    Unknown(String),
    /// The reader left a section before its end, or did not ask for it.
    #[error(
        "section {0:?} of the saved state was not read to its end: do both hosts run the same version of the VMM?"
    )]
    Unread(String),
    /// The state ends within a section, or without its end mark.
    #[error("the saved state is cut short")]
    CutShort,
    /// The bytes do not form sections.
    #[error("the saved state is not made of sections: {0}")]
    Malformed(&'static str),
    /// The stream of the saved state failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

coded!(SectionError, SectionErrorKind, "state-sections");

impl From<SectionError> for io::Error {
    fn from(error: SectionError) -> Self {
        match error {
            SectionError::Io(error) => error,
            error => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

#[cfg(test)]
mod tests;

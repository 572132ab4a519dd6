//! The declarations of `src/sys`, described for a comparison with the C header.

pub use crate::sys::described::{Constant, Field, Layout};

/// Every struct.
pub fn layouts() -> Vec<Layout> {
    crate::sys::structs::layouts()
}

/// Every constant and enumerator.
pub fn constants() -> Vec<Constant> {
    crate::sys::constants::constants()
}

//! The main channel of a migration stream: names of pages for this process, and a blob for the destination
//! QEMU.
//!
//! The layout is that of QEMU 7.2 to 10.0. It follows the machine type more than the version of QEMU, and
//! later versions may add to it. So the reader refuses by name everything that it does not expect: a page
//! that it misses is lost silently.
//!
//! ```text
//! "QEVM" 3 · configuration: machine type, subsections
//! START ram: table of blocks, EOS, footer
//! PART ram:  records, EOS, footer          again and again
//! [command SWITCHOVER_START]
//! END ram:   records, EOS, footer          the guest is stopped
//! device state, its description, end of the channel
//! ```
//!
//! A *record* names a page: zero, or with its bytes. Those of shared blocks are discarded. Those of other
//! blocks (firmware, video memory) are kept, the latest of each page, for END in the blob.

mod blob;
mod blocks;
mod commands;
mod configuration;
mod cursor;
mod encode;
mod error;
mod flags;
mod kinds;
mod reader;
mod records;
mod state;
mod unshared;
mod watch;

#[cfg(test)]
pub(crate) mod build;
#[cfg(test)]
mod tests;

pub use blob::Blob;
pub use error::{Section, StreamError, StreamFault};
pub use reader::{Expected, read};
pub use watch::{Stage, Watch};

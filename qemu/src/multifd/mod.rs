//! The multifd channels of a migration: packets of up to 128 pages.
//!
//! ```text
//! init: 64 bytes
//! packets: header of 1344 bytes with the offsets · the bytes of the pages that are not zero
//! ```
//!
//! Several channels and the main channel name pages at once, and no page has an order across channels. SYNC
//! packets are what shows that all pages have come: [`Channels::finish`].

mod channel;
mod channels;
pub(crate) mod error;
mod header;
pub(crate) mod pages;
mod progress;

#[cfg(test)]
pub(crate) mod build;
#[cfg(test)]
mod tests;

pub use channels::Channels;
pub use error::{ChannelError, ChannelsError, PacketFault};
pub use header::Dialect;
pub use pages::ChannelPages;

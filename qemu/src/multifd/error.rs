//! Why a multifd channel is refused, and where.

use std::io;
use std::sync::Arc;

/// A channel that is refused or that ended too early.
#[derive(Clone, Debug, thiserror::Error)]
#[error("multifd channel {}, packet {packet} at byte {offset}: {fault}", number(.channel))]
pub struct ChannelError {
    /// The channel's number, once the channel has said it.
    pub channel: Option<u8>,
    /// Packets before this one.
    pub packet: u64,
    /// Where the refused packet begins.
    pub offset: u64,
    /// What is wrong.
    pub fault: PacketFault,
}

fn number(channel: &Option<u8>) -> String {
    channel.map_or_else(|| "without a number".to_owned(), |number| number.to_string())
}

/// What is wrong with a packet.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PacketFault {
    /// The channel failed.
    #[error("reading failed: {0}")]
    Input(Arc<io::Error>),
    /// The channel ended within a packet.
    #[error("the channel ends within a packet: QEMU gave up the migration, or the connection was cut")]
    Ends,
    /// Something else than multifd.
    #[error("magic {magic:#010x} and version {version}, and 0x11223344 and 1 are expected")]
    Magic {
        /// The first four bytes.
        magic: u32,
        /// The four bytes after.
        version: u32,
    },
    /// The number is that of another channel, or too large.
    #[error("channel number {number} is a second one or not below {channels}, the number of channels")]
    Number {
        /// The number.
        number: u8,
        /// How many channels the caller expects.
        channels: usize,
    },
    /// The channel is of another guest.
    #[error("the channel's UUID is not that of the channels before: it is of another migration")]
    Uuid,
    /// Flags that this version does not know.
    #[error("unknown packet flags {flags:#x} ({name}): {remedy}")]
    Flags {
        /// The flags without SYNC.
        flags: u32,
        /// QEMU's name of the first.
        name: &'static str,
        /// What to change.
        remedy: &'static str,
    },
    /// More pages than a packet has room for.
    #[error("{normal} pages with bytes and {zero} of zeros in a packet of {allocated} at most")]
    Pages {
        /// Pages whose bytes follow.
        normal: u32,
        /// Pages of zeros.
        zero: u32,
        /// What the packet says is its room.
        allocated: u32,
    },
    /// A list of zero pages where the version of QEMU has none.
    #[error("{0} pages of zeros in a packet, which QEMU before 9.0 does not send")]
    ZeroPages(u32),
    /// The announced length is not that of the pages.
    #[error("{next} bytes are announced for {normal} pages: is multifd-compression none?")]
    Length {
        /// The announced length.
        next: u32,
        /// Pages whose bytes follow.
        normal: u32,
    },
    /// The name of the block is not text.
    #[error("the name of the block is empty or no text")]
    BlockName,
    /// An offset that is not a page's, or outside the block.
    #[error("offset {offset:#x} is no page of block {name:?}")]
    Offset {
        /// The block.
        name: String,
        /// The offset.
        offset: u64,
    },
    /// Too many pages outside the shared blocks.
    #[error(
        "pages of blocks that are not shared have more than {max} bytes: is all RAM of the guest shared?"
    )]
    UnsharedTooLarge {
        /// The limit.
        max: u64,
    },
    /// A page has two contents, and nothing says which is the later one.
    #[error("the page at {offset:#x} of block {name:?} came twice between two SYNC packets, on two channels")]
    TwoVersions {
        /// The block.
        name: String,
        /// The page's offset in bytes.
        offset: u64,
    },
    /// Pages come after all had come.
    #[error("pages follow the last SYNC packet of the migration")]
    AfterTheLast,
}

/// Why the channels together did not complete.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelsError {
    /// One of the channels failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A channel ended before it had all its pages.
    #[error("multifd channel {number} ended after {syncs} of {wanted} SYNC packets")]
    Ended {
        /// Its number.
        number: usize,
        /// The SYNC packets that came.
        syncs: u64,
        /// The marks on the main channel.
        wanted: u64,
    },
    /// Nothing arrives, and pages are missing.
    #[error("no multifd packet for {seconds} s, and channel {number} had {syncs} of {wanted} SYNC packets")]
    Silent {
        /// The first channel that is behind.
        number: usize,
        /// The SYNC packets that came.
        syncs: u64,
        /// The marks on the main channel.
        wanted: u64,
        /// How long nothing arrived.
        seconds: u64,
    },
    /// The two kinds of mark do not agree: an unknown way of counting.
    #[error(
        "multifd channel {number} had {syncs} SYNC packets for {wanted} marks: this version of QEMU is not \
         supported"
    )]
    TooManySyncs {
        /// Its number.
        number: usize,
        /// The SYNC packets that came.
        syncs: u64,
        /// The marks on the main channel.
        wanted: u64,
    },
    /// The main channel has flush marks, and its reader has no other channels.
    #[error("the stream has multifd channels, and none were read: the capability multifd must be off")]
    Unread,
}

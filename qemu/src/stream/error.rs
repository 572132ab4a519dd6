//! Why a stream is refused, and where.

use std::fmt;
use std::io;

use crate::multifd::error::ChannelsError;
use crate::stream::flags::RecordFlags;

/// A stream that is refused or that ended too early.
#[derive(Debug, thiserror::Error)]
#[error("the stream at byte {offset}, in {section}: {fault}")]
pub struct StreamError {
    /// Where the refused item begins, or the stream ended.
    pub offset: u64,
    /// The part of the stream.
    pub section: Section,
    /// What is wrong.
    pub fault: StreamFault,
}

/// A part of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// The first eight bytes.
    Header,
    /// The machine type and what follows.
    Configuration,
    /// The head of a section.
    Head,
    /// A section of RAM, or its footer.
    Ram {
        /// QEMU's number of the section.
        id: u32,
    },
    /// What follows RAM.
    DeviceState,
}

impl fmt::Display for Section {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => to.write_str("the header"),
            Self::Configuration => to.write_str("the configuration"),
            Self::Head => to.write_str("the head of a section"),
            Self::Ram { id } => write!(to, "section ram (id {id})"),
            Self::DeviceState => to.write_str("the device state"),
        }
    }
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamFault {
    /// The channel failed.
    #[error("reading failed: {0}")]
    Input(io::Error),
    /// The channel ended before RAM and device state were complete.
    #[error("the stream ends too early: QEMU gave up the migration, or the connection was cut")]
    Ends,
    /// The first bytes are those of something else.
    #[error("these are not the first bytes of a migration stream of version 3: {0:02x?}")]
    Header([u8; 8]),
    /// The stream does not name the machine type.
    #[error("byte {0:#04x} in place of the configuration: machine types before 2.4 are not supported")]
    NoConfiguration(u8),
    /// The length of the machine type's name is not believable.
    #[error("the name of the machine type has {len} bytes, and {max} at most are accepted")]
    MachineLength {
        /// The announced length.
        len: u32,
        /// The longest name.
        max: u32,
    },
    /// The guest is another machine.
    #[error("the machine type is {found:?}, and {expected:?} is expected")]
    Machine {
        /// What the stream says.
        found: String,
        /// What the caller expects.
        expected: String,
    },
    /// The configuration has a part that this version does not know.
    #[error("unknown subsection {name:?} of version {version}: this version of QEMU is not supported")]
    Subsection {
        /// Its name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// A capability changes the stream.
    #[error("the capability {name:?} changes the stream: it must be off")]
    Capability {
        /// QEMU's name.
        name: String,
    },
    /// Pages of another size.
    #[error("the machine's pages have 2^{0} bytes, and only 2^12 are supported")]
    PageBits(u32),
    /// A section type that this version does not know, or in a wrong place.
    #[error("section type {kind:#04x} ({name}) is not expected before the end of RAM")]
    SectionType {
        /// Its number.
        kind: u8,
        /// QEMU's name.
        name: &'static str,
    },
    /// A section of a device or of disks comes before the end of RAM.
    #[error("section {name:?} (id {id}) comes before the end of RAM: {remedy}")]
    ForeignSection {
        /// Its name.
        name: String,
        /// QEMU's number of the section.
        id: u32,
        /// What to change.
        remedy: &'static str,
    },
    /// RAM in a form that this version does not know.
    #[error("RAM has instance {instance} and version {version}, and 0 and 4 are expected")]
    RamVersion {
        /// The instance.
        instance: u32,
        /// The version of its form.
        version: u32,
    },
    /// RAM begins a second time.
    #[error("RAM starts for a second time")]
    RamTwice,
    /// A section goes on that never began.
    #[error("section id {0} goes on, and RAM did not start with that id")]
    SectionId(u32),
    /// What ends a section is not its footer.
    #[error("{0:02x?} in place of the section's footer")]
    Footer([u8; 5]),
    /// A command that cannot be followed.
    #[error("command {number} ({name}): {remedy}")]
    Command {
        /// Its number.
        number: u16,
        /// QEMU's name.
        name: &'static str,
        /// What to change.
        remedy: &'static str,
    },
    /// The command is in a wrong place or has a wrong length.
    #[error("command {number} with {len} bytes is not expected at this place")]
    MisplacedCommand {
        /// Its number.
        number: u16,
        /// The length of its data.
        len: u16,
    },
    /// A record of a kind that this version does not know.
    #[error("unknown record flags {0}")]
    Flags(RecordFlags),
    /// RAM starts without its table, or a table follows later.
    #[error("a table of blocks is expected once, as the first record of RAM")]
    Table,
    /// The name of a block is not text.
    #[error("the name of a block is empty or no text: {0:02x?}")]
    BlockName(Vec<u8>),
    /// Blocks are not whole pages, or their lengths do not add up.
    #[error(
        "block {name:?} of {len_bytes} bytes: the lengths must be whole pages and have the sum announced"
    )]
    BlockLength {
        /// The block.
        name: String,
        /// Its length.
        len_bytes: u64,
    },
    /// Two blocks have the same name.
    #[error("two blocks have the name {0:?}")]
    BlockTwice(String),
    /// More blocks than any machine has.
    #[error("more than {0} blocks")]
    TooManyBlocks(usize),
    /// A block that this process mapped is not in the table.
    #[error("QEMU has no block {0:?}, which this process mapped: its memory backend has another name")]
    SharedMissing(String),
    /// A block that this process mapped has another length.
    #[error("block {name:?} has {found} bytes, and {expected} bytes are mapped")]
    SharedLength {
        /// The block.
        name: String,
        /// QEMU's length in bytes.
        found: u64,
        /// The mapped length in bytes.
        expected: u64,
    },
    /// Too much RAM is outside the shared blocks.
    #[error(
        "blocks that are not shared have {bytes} bytes with {name:?}, more than {max}: is all RAM of the guest \
         in shared memory backends?"
    )]
    UnsharedTooLarge {
        /// The block that exceeds the limit.
        name: String,
        /// The sum until then.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A record names a block that is not in the table.
    #[error("block {0:?} is not in the table of blocks")]
    UnknownBlock(String),
    /// A record continues a block, and none came before.
    #[error("a record continues a block, and no record before names one")]
    NoBlock,
    /// A page lies outside its block.
    #[error("offset {offset:#x} lies outside block {name:?}")]
    PageOutside {
        /// The block.
        name: String,
        /// The offset in bytes.
        offset: u64,
    },
    /// A page is filled with a byte other than zero.
    #[error("a page filled with {0:#04x}: only zeros are supported")]
    FillByte(u8),
    /// A page has two contents, and nothing says which is the later one.
    #[error("the page at {offset:#x} of block {name:?} came twice between two marks, on two channels")]
    TwoVersions {
        /// The block.
        name: String,
        /// The page's offset in bytes.
        offset: u64,
    },
    /// The other channels did not complete.
    #[error(transparent)]
    Channels(#[from] ChannelsError),
    /// More device state than the limit.
    #[error("the device state has more than {max} bytes")]
    StateTooLarge {
        /// The limit.
        max: u64,
    },
}

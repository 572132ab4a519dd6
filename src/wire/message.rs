use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sterna_rdma::{Endpoint, RemoteKey};
use thiserror::Error;

use super::{Token, WireError};
use crate::memory::{PAGE_BYTES, RamLayout};

/// The longest name of a guest, in bytes.
pub const NAME_MAX: usize = 128;
/// The longest name of a file, in bytes: that of Linux.
pub const FILE_NAME_MAX: usize = 255;
/// The longest file that is sent as an image, in bytes: 16 TiB, the longest of ext4.
pub const IMAGE_MAX: u64 = 16 << 40;
/// The longest saved state of vCPUs and devices, in bytes: 64 MiB, where 256 vCPUs need about 4.
pub const STATE_MAX: usize = 64 << 20;
/// The most slices in one request for keys.
pub const SLICES_MAX: usize = 1024;
/// The most digests in one message.
pub const DIGESTS_MAX: usize = 16 << 10;
/// The most lanes a migration has.
const LANES_MAX: usize = 64;
/// The longest opaque description of a machine, in bytes.
const DETAILS_MAX: usize = 256 << 10;
/// The longest text that explains something, in bytes.
const TEXT_MAX: usize = 4 << 10;

/// One attempt to migrate. Every attempt has another, so that what is late from an earlier one is known as such.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub [u8; 16]);

impl fmt::Debug for Epoch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Which lock it is that arbitrates between two hosts: what its file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockToken(pub [u8; 16]);

/// What goes over the control channel. The order of a migration is told in [`source`](crate::source).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: what would come, and how.
    Hello(Hello),
    /// Destination: RAM is reserved and the lanes may connect.
    Ready(LaneReady),
    /// Destination: not here, for this reason. Nothing has been sent.
    Refused(Refusal),
    /// Source: let these slices of RAM be written to.
    RegisterSlices(Vec<SliceRange>),
    /// Destination: the keys for the slices, in the order asked.
    SliceKeys(Vec<SliceKey>),
    /// Source: nothing is on its way to these slices and nothing more will be, until they are registered anew. Not answered.
    ReleaseSlices(Vec<SliceRange>),
    /// Source: every lane has fenced this round.
    RoundClosed(u32),
    /// Digests of consecutive blocks of a file.
    Digests(Vec<[u8; 32]>),
    /// Source: all of the memory is there; this is the rest.
    Final(Final),
    /// Destination: nobody can write here any more, memory and state are in place, and I wait for GO.
    Prepared(Epoch, Completion),
    /// Source: it is yours. Sent at most once, and after it the source never runs the guest by itself.
    Go(Epoch),
    /// Destination: it runs here.
    Running(Epoch),
    /// Destination: the guest's first heartbeat here: its count, and how long after GO it came, in microseconds.
    Alive(Epoch, u64, u64),
    /// Either side: this attempt is over, for this reason, and the guest is at the source.
    Abort(Epoch, String),
    /// Source: a file would come instead of a guest, and how. The order of that is told in [`image`](crate::image).
    OfferImage(ImageOffer),
    /// Destination: the file is whole, on its disk and under its name.
    Stored(Epoch),
    /// Either side: the lanes of this attempt failed while the guest ran, for this reason. The source's word means that what has
    /// arrived counts for nothing, and that another HELLO follows. The destination's awaits that, or the end.
    LanesFailed(Epoch, String),
    /// Either side, every second: I am alive, also when I have nothing to say.
    Beat,
    /// Source: digests of some blocks of RAM.
    BlockDigests(BlockDigests),
    /// Destination: so many of the blocks that were to be compared at once are equal.
    Checked(u32),
    /// Source, in doubt, on a new connection: what became of this attempt? After [`Outcome::Prepared`] GO or Abort may follow.
    Ask(Epoch),
    /// Destination: this became of it.
    Outcome(Epoch, Outcome),
    /// Source: RUNNING was heard and recorded, so nobody will ask about this attempt.
    Done(Epoch),
}

/// What a destination's journal says of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All is in place, and GO is awaited.
    Prepared,
    /// The guest runs, or has run, here.
    Running,
    /// It did not run here, and never will.
    Refused,
    /// There is no word of it in any journal here. That proves nothing.
    Unknown,
}

/// The opening of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// This attempt.
    pub epoch: Epoch,
    /// The guest's name.
    pub name: String,
    /// Its RAM.
    pub ram: RamLayout,
    /// What the destination's VMM needs to make the same machine, in the VMM's own format.
    #[serde(with = "serde_bytes")]
    pub details: Vec<u8>,
    /// How the pages would travel.
    pub lanes: LaneOffer,
    /// The lock that the source holds, and whoever runs the guest must hold.
    pub lock: Option<LockToken>,
}

/// The opening of the transfer of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// This attempt.
    pub epoch: Epoch,
    /// The file's name, of one component. The destination need not follow it.
    pub name: String,
    /// The file's length.
    pub len_bytes: u64,
    /// How much of it is data and no hole.
    pub data_bytes: u64,
    /// What would travel; `None` of a file that is empty or one hole.
    pub content: Option<ImageContent>,
}

/// The parts of a file that hold data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageContent {
    /// Where they are, as if the file were RAM: a guest address is a place in the file. What lies between them is a hole.
    pub parts: RamLayout,
    /// How the pages would travel.
    pub lanes: LaneOffer,
}

/// How the source means to send pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaneOffer {
    /// So many TCP connections.
    Tcp(u8),
    /// Queue pairs, one a lane.
    Rdma {
        /// The source's ends.
        endpoints: Vec<Endpoint>,
        /// Whether a device that lacks the address of the control channel will do: RDMA was asked for by name.
        any_device: bool,
    },
}

impl LaneOffer {
    fn check_bounds(&self) -> Result<(), WireError> {
        match self {
            Self::Tcp(lanes) => lanes_bound((*lanes).into()),
            Self::Rdma { endpoints, .. } => lanes_bound(endpoints.len()),
        }
    }
}

impl ImageOffer {
    fn check_bounds(&self) -> Result<(), WireError> {
        let malformed = || WireError::Malformed("offer of a file");
        bound("a file's name", self.name.len(), FILE_NAME_MAX)?;
        if self.len_bytes > IMAGE_MAX {
            return Err(malformed());
        }
        let parts_bytes = match &self.content {
            None => 0,
            Some(ImageContent { parts, lanes }) => {
                lanes.check_bounds()?;
                parts.validate().map_err(|_| malformed())?;
                let last = parts.regions.last().ok_or_else(malformed)?;
                if last.guest_address + last.len_bytes > self.len_bytes.next_multiple_of(PAGE_BYTES) {
                    return Err(malformed());
                }
                parts.total_bytes()
            }
        };
        if self.data_bytes > parts_bytes { Err(malformed()) } else { Ok(()) }
    }
}

/// What the destination has made for the lanes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaneReady {
    /// Connections that show this token are expected, on the address of the control channel.
    Tcp(Token),
    /// Queue pairs, one a lane.
    Rdma {
        /// The destination's ends, connected to those offered, in the same order.
        endpoints: Vec<Endpoint>,
        /// How much RAM the destination can have registered at once; `None` if all of it.
        pin_max_bytes: Option<u64>,
    },
}

/// A part of a RAM region that is registered as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SliceRange {
    /// Index of the region.
    pub region: u16,
    /// First page, counted from the region's start.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

/// What it takes to write into a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceKey {
    /// The address of its first byte, in the destination's terms.
    pub address: u64,
    /// The key of its memory region.
    pub key: RemoteKey,
}

/// The end of the transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// This attempt.
    pub epoch: Epoch,
    /// The last round; its fence is on every lane.
    pub round: u32,
    /// How many blocks there are digests of, to be compared; none at all, or all.
    pub compare_blocks: u64,
    /// vCPU and device state, in the VMM's own format. As one run of bytes: it is encoded while the guest is paused.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
}

/// Digests of blocks of RAM, in any order; the last of a block counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigests {
    /// Whether the destination compares them at once, and answers, rather than after it has taken remote access away.
    pub now: bool,
    /// The digests.
    pub digests: Vec<BlockDigest>,
}

/// The digest of one block of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigest {
    /// Which, counted through all of RAM.
    pub block: u32,
    /// BLAKE3 of its 2 MiB.
    pub digest: [u8; 32],
}

/// What the destination did between FINAL and PREPARED.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// Pages whose digests were compared and found equal.
    pub verified_pages: u64,
    /// How long taking remote access away took, in microseconds.
    pub revoke_us: u64,
    /// How long comparing took.
    pub verify_us: u64,
    /// How long loading the state took.
    pub load_us: u64,
}

/// Why a destination does not take a guest.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Refusal {
    /// Not enough memory.
    #[error(
        "the destination has {} MiB of memory available and the guest needs {} MiB: free memory there, or choose another host",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Memory {
        /// What the guest needs.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// A guest of that name is there.
    #[error("a guest named {0} is at the destination already: stop it, or give this one another name there")]
    NameTaken(String),
    /// The destination cannot make this machine.
    #[error("the destination cannot run this guest: {0}")]
    Incompatible(String),
    /// The destination cannot carry the pages in the way offered.
    #[error("the destination cannot receive this way: {0}")]
    Transport(String),
    /// A file was offered where guests are awaited.
    #[error("the destination waits for a guest: start `sterna receive --into PATH` there to receive a file")]
    OnlyGuests,
    /// A guest was offered where a file is awaited.
    #[error(
        "the destination waits for a file: start `sterna receive` without --into there to receive a guest"
    )]
    OnlyImages,
    /// A file of that name is there.
    #[error(
        "{0} is at the destination already: give `sterna receive` there another --into, or --force to replace it"
    )]
    FileExists(String),
    /// Not enough room for a file.
    #[error(
        "the file system at the destination has {} MiB free and the file needs {} MiB: free some, or receive elsewhere",
        available_bytes >> 20,
        needed_bytes.div_ceil(1 << 20)
    )]
    Space {
        /// What the file needs.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// The destination cannot store this file.
    #[error("the destination cannot store this file: {0}")]
    Image(String),
    /// Another guest is on its way there.
    #[error(
        "another guest is arriving at the destination: wait for that, or start another `sterna receive` there"
    )]
    Busy,
    /// The destination could not remember what it does with the guest.
    #[error("the destination cannot keep a journal: {0}")]
    Journal(String),
    /// The guest has a lock, and the destination none.
    #[error(
        "the source holds a lock for this guest and the destination has none: start `sterna receive` there with --lock FILE"
    )]
    LockMissing,
    /// The destination has a lock, and the guest none.
    #[error(
        "the destination has a lock and the guest at the source runs without: start `sterna receive` there without --lock, or          the guest with it"
    )]
    LockUnknown,
    /// The two have no lock in common that would arbitrate between them.
    #[error("the destination cannot use its lock: {0}")]
    Lock(String),
}

impl Message {
    /// The message's kind in a frame's head.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => 1,
            Self::Ready(_) => 2,
            Self::Refused(_) => 3,
            Self::RegisterSlices(_) => 4,
            Self::SliceKeys(_) => 5,
            Self::RoundClosed(_) => 6,
            Self::Digests(_) => 7,
            Self::Final(_) => 8,
            Self::Prepared(..) => 9,
            Self::Go(_) => 10,
            Self::Running(_) => 11,
            Self::Alive(..) => 12,
            Self::Abort(..) => 13,
            Self::OfferImage(_) => 14,
            Self::Stored(_) => 15,
            Self::ReleaseSlices(_) => 16,
            Self::Beat => 17,
            Self::LanesFailed(..) => 18,
            Self::Ask(_) => 19,
            Self::Outcome(..) => 20,
            Self::Done(_) => 21,
            Self::BlockDigests(_) => 22,
            Self::Checked(_) => 23,
        }
    }

    /// The message's name, for errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        kind_bound(self.kind()).map_or("message", |(name, _)| name)
    }

    /// The longest body, in bytes, that a message of this kind may have.
    ///
    /// # Errors
    /// [`WireError::Kind`] for a kind that does not exist.
    pub fn body_max(kind: u16) -> Result<usize, WireError> {
        kind_bound(kind).map(|(_, max)| max).ok_or(WireError::Kind(kind))
    }

    /// The message's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it is longer than its kind may be.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let (what, max) = kind_bound(self.kind()).ok_or(WireError::Kind(self.kind()))?;
        let body = match self {
            Self::Hello(body) => postcard::to_stdvec(body),
            Self::Ready(body) => postcard::to_stdvec(body),
            Self::Refused(body) => postcard::to_stdvec(body),
            Self::RegisterSlices(body) | Self::ReleaseSlices(body) => postcard::to_stdvec(body),
            Self::SliceKeys(body) => postcard::to_stdvec(body),
            Self::RoundClosed(body) => postcard::to_stdvec(body),
            Self::Digests(body) => postcard::to_stdvec(body),
            Self::Final(body) => postcard::to_stdvec(body),
            Self::Prepared(epoch, completion) => postcard::to_stdvec(&(epoch, completion)),
            Self::Go(body)
            | Self::Running(body)
            | Self::Stored(body)
            | Self::Ask(body)
            | Self::Done(body) => postcard::to_stdvec(body),
            Self::Outcome(epoch, outcome) => postcard::to_stdvec(&(epoch, outcome)),
            Self::Alive(epoch, count, after_us) => postcard::to_stdvec(&(epoch, count, after_us)),
            Self::Abort(epoch, text) | Self::LanesFailed(epoch, text) => {
                let end = (0..=TEXT_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
                postcard::to_stdvec(&(epoch, &text[..end.unwrap_or(0)]))
            }
            Self::OfferImage(body) => postcard::to_stdvec(body),
            Self::Beat => Ok(Vec::new()),
            Self::BlockDigests(body) => postcard::to_stdvec(body),
            Self::Checked(body) => postcard::to_stdvec(body),
        }
        .map_err(|_| WireError::Malformed(what))?;
        if body.len() > max {
            return Err(WireError::TooLong { what, len: body.len(), max });
        }
        Ok(body)
    }

    /// Reads a message of a kind from its body, and checks every bound that the body's length does not imply.
    ///
    /// # Errors
    /// [`WireError`] for anything that this version would not send.
    pub fn decode(kind: u16, body: &[u8]) -> Result<Self, WireError> {
        let (what, max) = kind_bound(kind).ok_or(WireError::Kind(kind))?;
        if body.len() > max {
            return Err(WireError::TooLong { what, len: body.len(), max });
        }
        let message = match kind {
            1 => Self::Hello(parse(what, body)?),
            2 => Self::Ready(parse(what, body)?),
            3 => Self::Refused(parse(what, body)?),
            4 => Self::RegisterSlices(parse(what, body)?),
            5 => Self::SliceKeys(parse(what, body)?),
            6 => Self::RoundClosed(parse(what, body)?),
            7 => Self::Digests(parse(what, body)?),
            8 => Self::Final(parse(what, body)?),
            9 => parse(what, body).map(|(epoch, completion)| Self::Prepared(epoch, completion))?,
            10 => Self::Go(parse(what, body)?),
            11 => Self::Running(parse(what, body)?),
            12 => parse(what, body).map(|(epoch, count, after_us)| Self::Alive(epoch, count, after_us))?,
            13 => parse(what, body).map(|(epoch, text)| Self::Abort(epoch, text))?,
            14 => Self::OfferImage(parse(what, body)?),
            15 => Self::Stored(parse(what, body)?),
            16 => Self::ReleaseSlices(parse(what, body)?),
            17 => parse(what, body).map(|()| Self::Beat)?,
            18 => parse(what, body).map(|(epoch, text)| Self::LanesFailed(epoch, text))?,
            19 => Self::Ask(parse(what, body)?),
            20 => parse(what, body).map(|(epoch, outcome)| Self::Outcome(epoch, outcome))?,
            21 => Self::Done(parse(what, body)?),
            22 => Self::BlockDigests(parse(what, body)?),
            23 => Self::Checked(parse(what, body)?),
            other => return Err(WireError::Kind(other)),
        };
        message.check_bounds()?;
        Ok(message)
    }

    fn check_bounds(&self) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => {
                bound("a guest's name", hello.name.len(), NAME_MAX)?;
                bound("a machine's description", hello.details.len(), DETAILS_MAX)?;
                hello.ram.validate().map_err(|_| WireError::Malformed("RAM layout"))?;
                hello.lanes.check_bounds()
            }
            Self::OfferImage(offer) => offer.check_bounds(),
            Self::Ready(LaneReady::Rdma { endpoints, .. }) => lanes_bound(endpoints.len()),
            Self::RegisterSlices(slices) | Self::ReleaseSlices(slices) => {
                bound("a list of slices", slices.len(), SLICES_MAX)
            }
            Self::SliceKeys(keys) => bound("a list of keys", keys.len(), SLICES_MAX),
            Self::Digests(digests) => bound("a list of digests", digests.len(), DIGESTS_MAX),
            Self::BlockDigests(blocks) => bound("a list of digests", blocks.digests.len(), DIGESTS_MAX),
            Self::Final(last) => bound("saved state", last.state.len(), STATE_MAX),
            _ => Ok(()),
        }
    }
}

/// The name and the longest body of each kind; the body's length bounds every list in it.
fn kind_bound(kind: u16) -> Option<(&'static str, usize)> {
    Some(match kind {
        1 => ("Hello", DETAILS_MAX + (64 << 10)),
        2 => ("Ready", 16 << 10),
        3 => ("Refused", TEXT_MAX + 64),
        4 => ("RegisterSlices", SLICES_MAX * 24 + 8),
        5 => ("SliceKeys", SLICES_MAX * 24 + 8),
        6 => ("RoundClosed", 8),
        7 => ("Digests", DIGESTS_MAX * 32 + 8),
        8 => ("Final", STATE_MAX + 64),
        9 => ("Prepared", 64),
        10 => ("Go", 16),
        11 => ("Running", 16),
        12 => ("Alive", 64),
        13 => ("Abort", TEXT_MAX + 64),
        14 => ("OfferImage", 64 << 10),
        15 => ("Stored", 16),
        16 => ("ReleaseSlices", SLICES_MAX * 24 + 8),
        17 => ("Beat", 0),
        18 => ("LanesFailed", TEXT_MAX + 64),
        19 => ("Ask", 16),
        20 => ("Outcome", 17),
        21 => ("Done", 16),
        22 => ("BlockDigests", DIGESTS_MAX * 37 + 8),
        23 => ("Checked", 8),
        _ => return None,
    })
}

fn parse<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(WireError::Malformed(what)),
    }
}

fn bound(what: &'static str, len: usize, max: usize) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLong { what, len, max }) } else { Ok(()) }
}

fn lanes_bound(lanes: usize) -> Result<(), WireError> {
    if lanes == 0 {
        Err(WireError::Malformed("list of lanes"))
    } else {
        bound("a list of lanes", lanes, LANES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::RegionLayout;

    const EPOCH: Epoch = Epoch([7; 16]);

    fn hello() -> Hello {
        Hello {
            epoch: EPOCH,
            name: "tern".into(),
            ram: RamLayout { regions: vec![RegionLayout { guest_address: 0, len_bytes: 16 << 20 }] },
            details: vec![1, 2, 3],
            lanes: LaneOffer::Tcp(2),
            lock: Some(LockToken([7; 16])),
        }
    }

    /// An offer with as many parts as there may be, of a file that ends within its last page.
    fn image() -> ImageOffer {
        let part = |index: u64| RegionLayout { guest_address: index << 33, len_bytes: 8192 };
        let parts = RamLayout { regions: (0..1024).map(part).collect() };
        ImageOffer {
            epoch: EPOCH,
            name: "ö".repeat(127),
            len_bytes: (1023 << 33) + 4097,
            data_bytes: parts.total_bytes(),
            content: Some(ImageContent { parts, lanes: LaneOffer::Tcp(64) }),
        }
    }

    fn one_of_each() -> Vec<Message> {
        vec![
            Message::Hello(hello()),
            Message::Ready(LaneReady::Tcp(Token([1; 16]))),
            Message::Refused(Refusal::Memory { needed_bytes: 2, available_bytes: 1 }),
            Message::RegisterSlices(vec![SliceRange { region: 0, first_page: 0, pages: 9 }]),
            Message::SliceKeys(Vec::new()),
            Message::RoundClosed(u32::MAX),
            Message::Digests(vec![[0xff; 32]; DIGESTS_MAX]),
            Message::Final(Final { epoch: EPOCH, round: 4, compare_blocks: 8, state: vec![0; STATE_MAX] }),
            Message::Prepared(
                EPOCH,
                Completion { verified_pages: u64::MAX, revoke_us: u64::MAX, verify_us: u64::MAX, load_us: 1 },
            ),
            Message::Go(EPOCH),
            Message::Running(EPOCH),
            Message::Alive(EPOCH, u64::MAX, u64::MAX),
            Message::Abort(EPOCH, "cancelled".into()),
            Message::OfferImage(image()),
            Message::Stored(EPOCH),
            Message::ReleaseSlices(vec![SliceRange { region: 0, first_page: 0, pages: 9 }]),
            Message::LanesFailed(EPOCH, "the cable is out".into()),
            Message::Ask(EPOCH),
            Message::Outcome(EPOCH, Outcome::Unknown),
            Message::Done(EPOCH),
            Message::BlockDigests(BlockDigests {
                now: true,
                digests: vec![BlockDigest { block: u32::MAX, digest: [0xff; 32] }; DIGESTS_MAX],
            }),
            Message::Checked(u32::MAX),
        ]
    }

    #[test]
    fn each_message_comes_back_as_it_was_also_at_its_bound() {
        for (message, kind) in one_of_each().into_iter().zip((1..=16).chain(18..)) {
            assert_eq!(message.kind(), kind);
            let body = message.encode().unwrap();
            assert!(body.len() <= Message::body_max(kind).unwrap());
            assert_eq!(Message::decode(kind, &body).unwrap(), message);
        }
        assert_eq!(Message::body_max(24), Err(WireError::Kind(24)));
    }

    #[test]
    fn a_body_that_is_cut_or_has_more_behind_it_is_malformed() {
        for message in one_of_each() {
            let mut body = message.encode().unwrap();
            assert!(Message::decode(message.kind(), &body[..body.len() - 1]).is_err(), "{}", message.name());
            body.push(0);
            assert!(Message::decode(message.kind(), &body).is_err(), "{}", message.name());
        }
    }

    #[test]
    fn lanes_that_failed_say_why_in_a_bounded_text() {
        let failed = Message::LanesFailed(EPOCH, "the cable is out".into());
        assert_eq!(Message::decode(18, &failed.encode().unwrap()), Ok(failed));
        let body = Message::LanesFailed(EPOCH, "ö".repeat(TEXT_MAX)).encode().unwrap();
        assert!(matches!(Message::decode(18, &body), Ok(Message::LanesFailed(EPOCH, _))));
    }

    #[test]
    fn a_beat_has_no_body() {
        assert_eq!(Message::decode(17, &Message::Beat.encode().unwrap()), Ok(Message::Beat));
        assert!(matches!(Message::decode(17, &[0]), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn digests_of_blocks_come_back_also_at_their_bound() {
        let digests = vec![BlockDigest { block: u32::MAX, digest: [0xff; 32] }; DIGESTS_MAX];
        for message in [
            Message::BlockDigests(BlockDigests { now: true, digests: digests.clone() }),
            Message::Checked(u32::MAX),
        ] {
            let body = message.encode().unwrap();
            assert_eq!(Message::decode(message.kind(), &body), Ok(message));
        }
        let more = BlockDigests { now: false, digests: [&digests[..], &digests[..1]].concat() };
        let body = postcard::to_stdvec(&BlockDigests { digests: Vec::new(), ..more.clone() }).unwrap();
        assert!(Message::decode(22, &body).is_ok());
        assert!(matches!(Message::BlockDigests(more).encode(), Err(WireError::TooLong { .. })));
        // Short in bytes, and too many all the same.
        let small = vec![BlockDigest { block: 0, digest: [0; 32] }; DIGESTS_MAX + 1];
        let body = postcard::to_stdvec(&BlockDigests { now: false, digests: small }).unwrap();
        assert!(matches!(Message::decode(22, &body), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn bounds_hold_before_anything_is_believed() {
        let refused = |hello: Hello| Message::decode(1, &postcard::to_stdvec(&hello).unwrap()).unwrap_err();
        assert!(matches!(
            refused(Hello { name: "x".repeat(NAME_MAX + 1), ..hello() }),
            WireError::TooLong { .. }
        ));
        assert_eq!(
            refused(Hello { lanes: LaneOffer::Tcp(0), ..hello() }),
            WireError::Malformed("list of lanes")
        );
        assert!(matches!(refused(Hello { lanes: LaneOffer::Tcp(65), ..hello() }), WireError::TooLong { .. }));
        let ram = RamLayout { regions: vec![RegionLayout { guest_address: 0, len_bytes: 1 }] };
        assert_eq!(refused(Hello { ram, ..hello() }), WireError::Malformed("RAM layout"));
        assert!(matches!(Message::decode(10, &[0; 17]), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn an_offered_file_is_bounded_and_its_parts_lie_in_it() {
        let decode = |offer: ImageOffer| Message::decode(14, &postcard::to_stdvec(&offer).unwrap());
        let nothing = ImageOffer { data_bytes: 0, content: None, ..image() };
        assert!(decode(nothing.clone()).is_ok());
        for wrong in [
            ImageOffer { name: "x".repeat(256), ..image() },
            ImageOffer { len_bytes: IMAGE_MAX + 1, ..image() },
            ImageOffer { len_bytes: 1023 << 33, ..image() },
            ImageOffer { data_bytes: image().data_bytes + 1, ..image() },
            ImageOffer { data_bytes: 1, ..nothing.clone() },
            ImageOffer { len_bytes: u64::MAX, ..nothing },
        ] {
            assert!(decode(wrong.clone()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let text = "ö".repeat(TEXT_MAX);
        let body = Message::Abort(EPOCH, text.clone()).encode().unwrap();
        let Message::Abort(_, cut) = Message::decode(13, &body).unwrap() else { panic!("another kind") };
        assert!(!cut.is_empty() && text.starts_with(&cut));
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_make_it_panic(kind in 0..25u16, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(kind, &body);
        }
    }
}

//! The journal's bytes: what each side of a handover must not forget. Reading and writing them is the business of
//! [`crate::journal`].
//!
//! A journal is a file of fixed size, so that its space can be reserved before anything depends on it: a head, and
//! [`SLOTS`] slots, into which records go in turn. Each is there twice, in two blocks of 4 KiB, and carries its number and a
//! BLAKE3 digest; the last one whole is what the journal says. No block has parts of two records, and a copy lies within one
//! sector, which disks write whole or not at all. So
//!
//! * a write that is cut leaves in its slot a copy that is whole, or the older record, or nothing: never two damaged copies;
//! * a record that was written and of which one copy is damaged since is read from the other;
//! * of two damaged copies nobody knows what they said: the journal is not to be gone by.

use std::fmt;

use thiserror::Error;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::wire::Epoch;

/// A journal's length, in bytes.
pub const JOURNAL_LEN: usize = (1 + SLOTS) * SLOT_LEN;
/// The length of each write to a journal, in bytes: two copies.
pub const WRITE_LEN: usize = COPY_LEN + size_of::<Block>();
/// The longest name of a peer, in bytes: a host's name of 253, and a port.
pub const PEER_MAX: usize = 260;

/// Each copy of a record has a block of any disk for itself.
const COPY_LEN: usize = 4096;
const SLOT_LEN: usize = 2 * COPY_LEN;
/// The records of about the last eight attempts: a source that is still in doubt about one of them finds its answer.
const SLOTS: usize = 16;
const MAGIC: [u8; 8] = *b"STERNA-J";
const VERSION: u16 = 1;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mark {
    /// Destination: memory and state are in place; GO may come.
    Prepared,
    /// Source: GO may have been sent.
    Committed,
    /// Destination: the first vCPU may have run.
    Running,
    /// Either side: this epoch never ran at the destination, and never will.
    Refused,
    /// Source: the destination has said that it runs the guest.
    Done,
}

/// Which side of a handover a journal is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// The kernel's name for the time since the host was last started.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub mark: Mark,
    /// Of which attempt.
    pub epoch: Epoch,
    /// When: between which two starts of the host.
    pub boot: BootId,
    /// The other side, as the operator or the network named it.
    pub peer: String,
}

/// Why bytes are no journal to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Not a journal, or of another length.
    #[error("it is no journal of sterna")]
    Foreign,
    /// A journal of another version.
    #[error("it is a journal of version {theirs}, and this sterna writes version {VERSION}")]
    Version {
        /// The file's version.
        theirs: u16,
    },
    /// The other side's journal.
    #[error("it is the journal of a {0}, not of this side")]
    OtherSide(Side),
    /// A record is damaged that was whole once: what it said is unknown.
    #[error("record {0} is damaged, so it cannot be known what became of the last migration")]
    Damaged(usize),
    /// The other side's name is longer than a record takes.
    #[error("the other side's name is {0} bytes long, and a record takes {PEER_MAX}")]
    Peer(usize),
}

/// What a journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal {
    side: Side,
    /// The number of the next record; the first is 1.
    next: u64,
    /// The last ones, the oldest first.
    records: Vec<Record>,
}

impl Journal {
    /// A journal without records.
    #[must_use]
    pub fn empty(side: Side) -> Self {
        Self { side, next: 1, records: Vec::new() }
    }

    /// The first bytes of a new journal; the rest is zeros. They must be on the disk before the first record is written.
    #[must_use]
    pub fn head(side: Side) -> [u8; WRITE_LEN] {
        twice(&Block::new(side, 0, 0).sealed())
    }

    /// Reads a journal.
    ///
    /// A record whose write was cut is as if it had never been begun. It can only be the one that would be next.
    ///
    /// # Errors
    /// [`JournalError`], but for [`JournalError::Peer`].
    pub fn read(bytes: &[u8], side: Side) -> Result<Self, JournalError> {
        if bytes.len() != JOURNAL_LEN {
            return Err(JournalError::Foreign);
        }
        let mut slots = bytes.chunks_exact(SLOT_LEN).map(|slot| {
            let (first, second) = slot.split_at(COPY_LEN);
            [Block::read(first), Block::read(second)]
        });
        check_head(slots.next().ok_or(JournalError::Foreign)?, side)?;
        let slots: Vec<_> = slots.enumerate().map(|(slot, copies)| Slot::of(&copies, side, slot)).collect();
        let mut whole: Vec<_> = slots.iter().filter_map(|slot| slot.record.clone()).collect();
        whole.sort_by_key(|(number, _)| *number);
        let next = whole.last().map_or(1, |(last, _)| last + 1);
        for (index, slot) in slots.iter().enumerate() {
            // Only the write that would be next can have been cut, and it leaves one copy as it was.
            let cut = slot.damaged == 1 && index == slot_of(next);
            if slot.damaged == 2 || (slot.damaged == 1 && slot.record.is_none() && !cut) {
                return Err(JournalError::Damaged(index));
            }
        }
        // Numbers without a gap: a record that went missing might be the one that matters.
        let first = whole.first().map_or(next, |(first, _)| *first);
        if next - first != whole.len() as u64 || (first > 1 && whole.len() < SLOTS) {
            return Err(JournalError::Damaged(slot_of(first)));
        }
        Ok(Self { side, next, records: whole.into_iter().map(|(_, record)| record).collect() })
    }

    /// Where the next record goes in the file, and its bytes. Until it is known to have been [added](Self::add), the next one
    /// goes to the same place.
    ///
    /// # Errors
    /// [`JournalError::Peer`].
    pub fn write(&self, record: &Record) -> Result<(u64, [u8; WRITE_LEN]), JournalError> {
        let peer = record.peer.as_bytes();
        let mut block = Block::new(self.side, record.mark.kind(), self.next);
        block.epoch = record.epoch.0;
        block.boot = record.boot.0;
        block.peer.get_mut(..peer.len()).ok_or(JournalError::Peer(peer.len()))?.copy_from_slice(peer);
        block.peer_len = U16::new(u16::try_from(peer.len()).map_err(|_| JournalError::Peer(peer.len()))?);
        Ok(((SLOT_LEN * (1 + slot_of(self.next))) as u64, twice(&block.sealed())))
    }

    /// Adds a record that was written.
    pub fn add(&mut self, record: Record) {
        self.next += 1;
        if self.records.len() == SLOTS {
            self.records.remove(0);
        }
        self.records.push(record);
    }

    /// The records, the oldest first.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The last record.
    #[must_use]
    pub fn last(&self) -> Option<&Record> {
        self.records.last()
    }

    /// The last word on an attempt.
    #[must_use]
    pub fn of(&self, epoch: Epoch) -> Option<&Record> {
        self.records.iter().rev().find(|record| record.epoch == epoch)
    }
}

/// What the two copies of a slot say.
struct Slot {
    /// The latest record that is whole in either, with its number.
    record: Option<(u64, Record)>,
    /// How many copies are neither whole nor blank.
    damaged: usize,
}

impl Slot {
    fn of(copies: &[Block; 2], side: Side, slot: usize) -> Self {
        let read = copies.each_ref().map(|copy| copy.record(side, slot));
        let damaged = copies.iter().zip(&read).filter(|(copy, read)| read.is_none() && !copy.is_blank());
        let damaged = damaged.count();
        let [first, second] = read;
        // Of two with one number the first: it is written first, over one that failed.
        let first_counts =
            first.as_ref().map(|(number, _)| *number) >= second.as_ref().map(|(number, _)| *number);
        Self { record: if first_counts { first } else { second }, damaged }
    }
}

fn check_head(copies: [Block; 2], side: Side) -> Result<(), JournalError> {
    let [first, second] = copies;
    let head = if first.is_whole() { first } else { second };
    if head.magic != MAGIC {
        return Err(JournalError::Foreign);
    }
    if head.version.get() != VERSION {
        return Err(JournalError::Version { theirs: head.version.get() });
    }
    if !head.is_whole() || head.kind != 0 {
        return Err(JournalError::Foreign);
    }
    match Side::of(head.side) {
        Some(of) if of == side => Ok(()),
        Some(other) => Err(JournalError::OtherSide(other)),
        None => Err(JournalError::Foreign),
    }
}

/// The bytes of a write: a block, and again where the next block of a disk begins.
fn twice(block: &Block) -> [u8; WRITE_LEN] {
    let mut bytes = [0; WRITE_LEN];
    bytes[..size_of::<Block>()].copy_from_slice(block.as_bytes());
    bytes[COPY_LEN..].copy_from_slice(block.as_bytes());
    bytes
}

/// What is at the beginning of every copy of a record, and of the file.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    /// Of all that follows.
    digest: [u8; 32],
    magic: [u8; 8],
    version: U16,
    /// 1 the source's, 2 the destination's.
    side: u8,
    /// 0 the head, else the mark.
    kind: u8,
    peer_len: U16,
    unused: [u8; 2],
    number: U64,
    epoch: [u8; 16],
    boot: [u8; 16],
    peer: [u8; PEER_MAX],
}

impl Block {
    fn new(side: Side, kind: u8, number: u64) -> Self {
        let mut block = Self::new_zeroed();
        block.magic = MAGIC;
        block.version = U16::new(VERSION);
        block.side = side.byte();
        block.kind = kind;
        block.number = U64::new(number);
        block
    }

    fn read(copy: &[u8]) -> Self {
        Self::read_from_prefix(copy).map_or_else(|_| Self::new_zeroed(), |(block, _)| block)
    }

    fn sealed(mut self) -> Self {
        self.digest = self.expected_digest();
        self
    }

    fn expected_digest(&self) -> [u8; 32] {
        *blake3::hash(&self.as_bytes()[self.digest.len()..]).as_bytes()
    }

    fn is_whole(&self) -> bool {
        self.digest == self.expected_digest()
    }

    fn is_blank(&self) -> bool {
        self.as_bytes().iter().all(|&byte| byte == 0)
    }

    /// The record in this block with its number, if it is whole and in its place.
    fn record(&self, side: Side, slot: usize) -> Option<(u64, Record)> {
        let number = self.number.get();
        let in_place = number > 0 && slot_of(number) == slot && Side::of(self.side) == Some(side);
        if self.magic != MAGIC || self.version.get() != VERSION || !self.is_whole() || !in_place {
            return None;
        }
        let peer = self.peer.get(..self.peer_len.get().into())?;
        let record = Record {
            mark: Mark::of(self.kind)?,
            epoch: Epoch(self.epoch),
            boot: BootId(self.boot),
            peer: std::str::from_utf8(peer).ok()?.to_owned(),
        };
        Some((number, record))
    }
}

fn slot_of(number: u64) -> usize {
    usize::try_from((number - 1) % SLOTS as u64).unwrap_or(0)
}

impl Mark {
    fn kind(self) -> u8 {
        match self {
            Self::Prepared => 1,
            Self::Committed => 2,
            Self::Running => 3,
            Self::Refused => 4,
            Self::Done => 5,
        }
    }

    fn of(kind: u8) -> Option<Self> {
        [Self::Prepared, Self::Committed, Self::Running, Self::Refused, Self::Done]
            .into_iter()
            .find(|mark| mark.kind() == kind)
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Prepared => "PREPARED",
            Self::Committed => "COMMITTED",
            Self::Running => "RUNNING",
            Self::Refused => "REFUSED",
            Self::Done => "DONE",
        })
    }
}

impl Side {
    fn byte(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Destination => 2,
        }
    }

    fn of(byte: u8) -> Option<Self> {
        [Self::Source, Self::Destination].into_iter().find(|side| side.byte() == byte)
    }
}

impl fmt::Display for Side {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

impl BootId {
    /// Reads what `/proc/sys/kernel/random/boot_id` says.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text.trim().chars().filter(|&letter| letter != '-').collect();
        if digits.len() != 32 || !digits.is_ascii() {
            return None;
        }
        let mut bytes = [0; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Debug for BootId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blank(side: Side) -> Vec<u8> {
        let mut file = vec![0; JOURNAL_LEN];
        file[..WRITE_LEN].copy_from_slice(&Journal::head(side));
        file
    }

    fn record(number: u8) -> Record {
        let mark = [Mark::Prepared, Mark::Running, Mark::Refused][usize::from(number) % 3];
        let peer = "host-a:7837".repeat(usize::from(number) % 4);
        Record { mark, epoch: Epoch([number; 16]), boot: BootId([9; 16]), peer }
    }

    /// A file, and the journal in it, after so many records.
    fn written(records: u8) -> (Vec<u8>, Journal) {
        let (mut file, mut journal) = (blank(Side::Destination), Journal::empty(Side::Destination));
        for number in 1..=records {
            put(&mut file, &journal, &record(number), WRITE_LEN);
            journal.add(record(number));
        }
        (file, journal)
    }

    /// Writes a record, or only its first bytes.
    fn put(file: &mut [u8], journal: &Journal, record: &Record, len: usize) {
        let (at, bytes) = journal.write(record).unwrap();
        let at = usize::try_from(at).unwrap();
        file[at..at + len].copy_from_slice(&bytes[..len]);
    }

    #[test]
    fn it_says_what_was_written_also_after_it_has_gone_round() {
        for records in [0, 1, 2, 15, 16, 17, 40] {
            let (file, journal) = written(records);
            assert_eq!(Journal::read(&file, Side::Destination), Ok(journal.clone()), "{records}");
            assert_eq!(journal.last(), (records > 0).then(|| record(records)).as_ref());
            let known = (1..=records).filter(|&number| journal.of(Epoch([number; 16])).is_some()).count();
            assert_eq!(known, usize::from(records).min(SLOTS));
        }
    }

    #[test]
    fn a_record_that_was_not_added_is_overwritten_by_the_next() {
        let (mut file, mut journal) = written(3);
        put(&mut file, &journal, &record(100), WRITE_LEN);
        put(&mut file, &journal, &record(101), WRITE_LEN);
        journal.add(record(101));
        assert_eq!(Journal::read(&file, Side::Destination), Ok(journal));
    }

    #[test]
    fn what_is_no_journal_of_this_side_and_version_is_told_apart() {
        let (file, _) = written(2);
        assert_eq!(Journal::read(&file, Side::Source), Err(JournalError::OtherSide(Side::Destination)));
        assert_eq!(Journal::read(&file[1..], Side::Destination), Err(JournalError::Foreign));
        assert_eq!(Journal::read(&vec![0; JOURNAL_LEN], Side::Source), Err(JournalError::Foreign));
        assert_eq!(Journal::read(&vec![b'x'; JOURNAL_LEN], Side::Source), Err(JournalError::Foreign));
        let mut other = file.clone();
        (other[40], other[COPY_LEN + 40]) = (7, 7);
        assert_eq!(Journal::read(&other, Side::Destination), Err(JournalError::Version { theirs: 7 }));
        let long = Record { peer: "x".repeat(PEER_MAX + 1), ..record(1) };
        assert_eq!(Journal::empty(Side::Source).write(&long), Err(JournalError::Peer(PEER_MAX + 1)));
    }

    /// Where a copy of a record is.
    fn place(number: u8, copy: usize) -> usize {
        SLOT_LEN * (1 + slot_of(number.into())) + copy * COPY_LEN
    }

    #[test]
    fn a_record_that_was_whole_and_is_damaged_is_not_passed_over() {
        for (records, number) in [(1, 1), (3, 1), (3, 2), (3, 3), (20, 10), (20, 17), (20, 20)] {
            let (mut file, _) = written(records);
            (file[place(number, 0) + 60], file[place(number, 1) + 60]) = (9, 9);
            assert_eq!(
                Journal::read(&file, Side::Destination),
                Err(JournalError::Damaged(slot_of(number.into()))),
                "{number} of {records}"
            );
        }
        for (records, number) in [(3, 1), (3, 2), (20, 7)] {
            let (mut file, _) = written(records);
            file[place(number, 0)..][..SLOT_LEN].fill(0);
            assert!(matches!(Journal::read(&file, Side::Destination), Err(JournalError::Damaged(_))));
        }
    }

    #[test]
    fn a_boot_id_is_read_from_the_kernels_words() {
        let text = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0\n";
        let id = BootId::parse(text).unwrap();
        assert_eq!((id.0[0], id.0[15]), (0x0f, 0xf0));
        for wrong in ["", "0f1e", "zz1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", "éééééééééééééééé"]
        {
            assert_eq!(BootId::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        /// The disk may have kept any prefix of a write that was cut, or only its second copy.
        #[test]
        fn a_write_that_was_cut_costs_no_record_that_was_there(
            records in 0..40u8, len in 0..=WRITE_LEN, second_first: bool,
        ) {
            let (mut file, mut journal) = written(records);
            let next = record(records + 1);
            let first = file[place(records + 1, 0)..][..COPY_LEN].to_vec();
            put(&mut file, &journal, &next, len);
            if second_first {
                file[place(records + 1, 0)..][..COPY_LEN].copy_from_slice(&first);
            }
            let is_whole = |copy| {
                let (_, bytes) = journal.write(&next).unwrap();
                file[place(records + 1, copy)..].starts_with(&bytes[..size_of::<Block>()])
            };
            let written = is_whole(0) || is_whole(1);
            if written {
                journal.add(next);
            }
            prop_assert_eq!(Journal::read(&file, Side::Destination), Ok(journal));
        }

        /// Also damage to the very last one: it does not pass for the cut write of the next.
        #[test]
        fn a_record_with_one_damaged_block_is_read_from_its_copy(
            records in 1..40u8, back in 0..16u8, copy in 0..2usize, at in 0..size_of::<Block>(), noise in 1..=255u8,
        ) {
            let (mut file, journal) = written(records);
            let number = records.saturating_sub(back).max(1);
            file[place(number, copy) + at] ^= noise;
            prop_assert_eq!(Journal::read(&file, Side::Destination), Ok(journal.clone()));
            file[place(number, copy)..][..COPY_LEN].fill(0);
            prop_assert_eq!(Journal::read(&file, Side::Destination), Ok(journal.clone()));
            // Damage on both: detected.
            let other = 1 - copy;
            file[place(number, copy)] = noise;
            file[place(number, other) + at] ^= noise;
            prop_assert!(matches!(Journal::read(&file, Side::Destination), Err(JournalError::Damaged(_))));
        }

        #[test]
        fn no_bytes_make_it_panic(at in 0..JOURNAL_LEN - 64, noise in prop::collection::vec(any::<u8>(), 64)) {
            let (mut file, _) = written(20);
            file[at..at + 64].copy_from_slice(&noise);
            let _ = Journal::read(&file, Side::Destination);
        }
    }
}

//! The sequence of records of one guest on one host, and its bytes. [`crate::state`] reads and writes them.
//!
//! A host has one sequence for each guest, whichever role it plays in an attempt. So the last record says
//! where the guest is, even after it has left and returned. The sequence has a fixed size, so that its space
//! can be reserved before anything depends on it: a head, and [`SLOTS`] slots, which records fill in turn.
//! Each record is stored twice, in two blocks of 4 KiB, with its number and a BLAKE3 digest; the last intact
//! record counts. No block holds parts of two records. A copy lies within one sector, which disks write whole
//! or not at all. So
//!
//! * an interrupted write leaves in its slot an intact copy, or the older record, or nothing: never two
//!   damaged copies;
//! * a record with one damaged copy is read from the other;
//! * two damaged copies make the sequence unusable: the record's content is unknown.

use std::fmt;
use std::net::SocketAddr;

use sterna_trust::Fingerprint;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error_code::coded;
use crate::wire::AttemptId;

/// A journal's length, in bytes.
pub const JOURNAL_LEN: usize = (1 + SLOTS) * SLOT_LEN;
/// The length of each write to a journal, in bytes: two copies.
pub const WRITE_LEN: usize = COPY_LEN + size_of::<Block>();
/// The longest name of a peer, in bytes: a host's name of 253, and a port.
pub const PEER_MAX: usize = 260;
/// Space for the text of an address: IPv6 with a scope and a port.
const ADDRESS_MAX: usize = 72;

/// Each copy of a record has a disk block of its own.
const COPY_LEN: usize = 4096;
const SLOT_LEN: usize = 2 * COPY_LEN;
/// The records of about the last eight attempts: a source that is still in doubt about such an attempt finds
/// its answer.
const SLOTS: usize = 16;
const MAGIC: [u8; 8] = *b"STERNA-J";
/// Version 1 had one file for each role. Version 2, which is read, too, had no identities.
const VERSION: u16 = 3;
const VERSION_WITHOUT_IDENTITY: u16 = 2;

/// What a record states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// Source: a guest was started on this host; no attempt brought it.
    Started,
    /// Destination: memory and state are in place; GO may arrive.
    Prepared,
    /// Source: GO may have been sent.
    Committed,
    /// Destination: the first vCPU may have run.
    Running,
    /// Either side: this attempt never ran at the destination, and never will.
    Refused,
    /// Source: the destination has reported that it runs the guest.
    Done,
}

/// Which side of a handover wrote a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it states.
    pub mark: RecordKind,
    /// The role of this host in the attempt.
    pub side: Side,
    /// The attempt; zeros for [`RecordKind::Started`], which has none.
    pub attempt_id: AttemptId,
    /// The other side, as the operator or the network named it.
    pub peer: String,
    /// The address at which the other side answered: a name may resolve to another host the next time.
    pub address: Option<SocketAddr>,
    /// The key that the other side has proved: no other host takes part in the attempt. `None` without TLS.
    pub identity: Option<Fingerprint>,
}

/// Why bytes are not a usable journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(JournalErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum JournalError {
    /// The file is not a sequence of records, or has another length.
    #[error("it is no state file of sterna")]
    Foreign,
    /// The file has another version.
    #[error("it is a state file of version {theirs}, and this sterna writes version {VERSION}")]
    Version {
        /// The file's version.
        theirs: u16,
    },
    /// A record that was intact is damaged: its content is unknown.
    #[error("record {0} is damaged, so the outcome of the last migration is unknown")]
    Damaged(usize),
    /// The name of the other side is longer than a record can hold.
    #[error("the other side's name is {0} bytes long, and a record holds {PEER_MAX}")]
    Peer(usize),
}

coded!(JournalError, JournalErrorKind, "records");

/// The records of one guest on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal {
    /// The number of the next record; the first has number 1.
    next: u64,
    /// The last records, oldest first.
    records: Vec<Record>,
}

impl Journal {
    /// A journal without records.
    #[must_use]
    pub fn empty() -> Self {
        Self { next: 1, records: Vec::new() }
    }

    /// The first bytes of a new journal; the rest is zeros. They must be durable before the first record is
    /// written.
    #[must_use]
    pub fn head() -> [u8; WRITE_LEN] {
        twice(&Block::new(0, 0).sealed())
    }

    /// Reads a journal.
    ///
    /// A record with an interrupted write counts as never begun. It can only be the next record.
    ///
    /// # Errors
    /// [`JournalError`], except [`JournalError::Peer`].
    pub fn read(bytes: &[u8]) -> Result<Self, JournalError> {
        if bytes.len() != JOURNAL_LEN {
            return Err(JournalError::Foreign);
        }
        let mut slots = bytes.chunks_exact(SLOT_LEN).map(|slot| {
            let (first, second) = slot.split_at(COPY_LEN);
            [Block::read(first), Block::read(second)]
        });
        check_head(slots.next().ok_or(JournalError::Foreign)?)?;
        let slots: Vec<_> = slots.enumerate().map(|(slot, copies)| Slot::of(&copies, slot)).collect();
        let mut whole: Vec<_> = slots.iter().filter_map(|slot| slot.record.clone()).collect();
        whole.sort_by_key(|(number, _)| *number);
        let next = whole.last().map_or(1, |(last, _)| last + 1);
        for (index, slot) in slots.iter().enumerate() {
            // Only the next write can have been interrupted, and it leaves one copy unchanged.
            let cut = slot.damaged == 1 && index == slot_of(next);
            if slot.damaged == 2 || (slot.damaged == 1 && slot.record.is_none() && !cut) {
                return Err(JournalError::Damaged(index));
            }
        }
        // Numbers without a gap: a missing record might be the decisive one.
        let first = whole.first().map_or(next, |(first, _)| *first);
        if next - first != whole.len() as u64 || (first > 1 && whole.len() < SLOTS) {
            return Err(JournalError::Damaged(slot_of(first)));
        }
        Ok(Self { next, records: whole.into_iter().map(|(_, record)| record).collect() })
    }

    /// The offset of the next record in the file, and its bytes. Until a record is [added](Self::add), the
    /// next one has the same offset.
    ///
    /// # Errors
    /// [`JournalError::Peer`].
    pub fn write(&self, record: &Record) -> Result<(u64, [u8; WRITE_LEN]), JournalError> {
        let peer = record.peer.as_bytes();
        let mut block = Block::new(record.mark.kind(), self.next);
        block.side = record.side.byte();
        block.attempt_id = record.attempt_id.0;
        let address = record.address.map(|address| address.to_string()).unwrap_or_default();
        let room = block.address.get_mut(..address.len()).ok_or(JournalError::Peer(address.len()))?;
        room.copy_from_slice(address.as_bytes());
        block.peer.get_mut(..peer.len()).ok_or(JournalError::Peer(peer.len()))?.copy_from_slice(peer);
        block.identity = record.identity.map_or([0; 32], |identity| identity.0);
        block.peer_len = U16::new(u16::try_from(peer.len()).map_err(|_| JournalError::Peer(peer.len()))?);
        Ok(((SLOT_LEN * (1 + slot_of(self.next))) as u64, twice(&block.sealed())))
    }

    /// Adds a record that is durable.
    pub fn add(&mut self, record: Record) {
        self.next += 1;
        if self.records.len() == SLOTS {
            self.records.remove(0);
        }
        self.records.push(record);
    }

    /// The records, oldest first.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The last record.
    #[must_use]
    pub fn last(&self) -> Option<&Record> {
        self.records.last()
    }

    /// The last record of an attempt.
    #[must_use]
    pub fn of(&self, attempt_id: AttemptId) -> Option<&Record> {
        self.records.iter().rev().find(|record| record.attempt_id == attempt_id)
    }
}

/// The content of a slot's two copies.
struct Slot {
    /// The latest record that is intact in either copy, with its number.
    record: Option<(u64, Record)>,
    /// The number of copies that are neither intact nor blank.
    damaged: usize,
}

impl Slot {
    fn of(copies: &[Block; 2], slot: usize) -> Self {
        let read = copies.each_ref().map(|copy| copy.record(slot));
        let damaged = copies.iter().zip(&read).filter(|(copy, read)| read.is_none() && !copy.is_blank());
        let damaged = damaged.count();
        let [first, second] = read;
        // Two copies with one number: the first counts, because it is written first, over one that failed.
        let first_counts =
            first.as_ref().map(|(number, _)| *number) >= second.as_ref().map(|(number, _)| *number);
        Self { record: if first_counts { first } else { second }, damaged }
    }
}

fn check_head(copies: [Block; 2]) -> Result<(), JournalError> {
    let [first, second] = copies;
    let head = if first.is_whole() { first } else { second };
    if head.magic != MAGIC {
        return Err(JournalError::Foreign);
    }
    if !head.has_known_version() {
        return Err(JournalError::Version { theirs: head.version.get() });
    }
    if !head.is_whole() || head.kind != 0 {
        return Err(JournalError::Foreign);
    }
    Ok(())
}

/// The bytes of a write: a block, and the same block again at the start of the disk's next block.
fn twice(block: &Block) -> [u8; WRITE_LEN] {
    let mut bytes = [0; WRITE_LEN];
    bytes[..size_of::<Block>()].copy_from_slice(block.as_bytes());
    bytes[COPY_LEN..].copy_from_slice(block.as_bytes());
    bytes
}

/// The start of the file, and of every copy of a record.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    /// Digest of all that follows.
    digest: [u8; 32],
    magic: [u8; 8],
    version: U16,
    /// 0: the head; 1: a source's record; 2: a destination's.
    side: u8,
    /// 0: the head; else the kind of record.
    kind: u8,
    peer_len: U16,
    unused: [u8; 2],
    number: U64,
    attempt_id: [u8; 16],
    peer: [u8; PEER_MAX],
    /// Text, padded with zeros.
    address: [u8; ADDRESS_MAX],
    /// Zeros without one.
    identity: [u8; 32],
}

impl Block {
    fn new(kind: u8, number: u64) -> Self {
        let mut block = Self::new_zeroed();
        block.magic = MAGIC;
        block.version = U16::new(VERSION);
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
        let end = match self.version.get() {
            VERSION_WITHOUT_IDENTITY => size_of::<Self>() - self.identity.len(),
            _ => size_of::<Self>(),
        };
        *blake3::hash(&self.as_bytes()[self.digest.len()..end]).as_bytes()
    }

    fn has_known_version(&self) -> bool {
        matches!(self.version.get(), VERSION | VERSION_WITHOUT_IDENTITY)
    }

    fn is_whole(&self) -> bool {
        self.digest == self.expected_digest()
    }

    fn is_blank(&self) -> bool {
        self.as_bytes().iter().all(|&byte| byte == 0)
    }

    /// The record in this block with its number, if it is intact and in its place.
    fn record(&self, slot: usize) -> Option<(u64, Record)> {
        let number = self.number.get();
        // No sequence comes to the last number, which has no next.
        let in_place = (1..u64::MAX).contains(&number) && slot_of(number) == slot;
        if self.magic != MAGIC || !self.has_known_version() || !self.is_whole() || !in_place {
            return None;
        }
        let peer = self.peer.get(..self.peer_len.get().into())?;
        let record = Record {
            mark: RecordKind::of(self.kind)?,
            side: Side::of(self.side)?,
            attempt_id: AttemptId(self.attempt_id),
            peer: std::str::from_utf8(peer).ok()?.to_owned(),
            address: std::str::from_utf8(&self.address).ok()?.trim_end_matches('\0').parse().ok(),
            identity: Some(Fingerprint(self.identity))
                .filter(|identity| self.version.get() == VERSION && identity.0 != [0; 32]),
        };
        Some((number, record))
    }
}

fn slot_of(number: u64) -> usize {
    usize::try_from((number - 1) % SLOTS as u64).unwrap_or(0)
}

impl RecordKind {
    fn kind(self) -> u8 {
        match self {
            Self::Prepared => 1,
            Self::Committed => 2,
            Self::Running => 3,
            Self::Refused => 4,
            Self::Done => 5,
            Self::Started => 6,
        }
    }

    fn of(kind: u8) -> Option<Self> {
        [Self::Prepared, Self::Committed, Self::Running, Self::Refused, Self::Done, Self::Started]
            .into_iter()
            .find(|mark| mark.kind() == kind)
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Prepared => "PREPARED",
            Self::Committed => "COMMITTED",
            Self::Running => "RUNNING",
            Self::Refused => "REFUSED",
            Self::Done => "DONE",
            Self::Started => "STARTED",
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blank() -> Vec<u8> {
        let mut file = vec![0; JOURNAL_LEN];
        file[..WRITE_LEN].copy_from_slice(&Journal::head());
        file
    }

    fn record(number: u8) -> Record {
        let mark = [RecordKind::Prepared, RecordKind::Running, RecordKind::Refused][usize::from(number) % 3];
        let peer = "host-a:7837".repeat(usize::from(number) % 4);
        let address = number.is_multiple_of(2).then(|| ([192, 0, 2, number], 7837).into());
        let identity = number.is_multiple_of(3).then_some(Fingerprint([number; 32]));
        Record { mark, side: Side::Destination, attempt_id: AttemptId([number; 16]), peer, address, identity }
    }

    /// A file with this number of records, and its journal.
    fn written(records: u8) -> (Vec<u8>, Journal) {
        let (mut file, mut journal) = (blank(), Journal::empty());
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
            assert_eq!(Journal::read(&file), Ok(journal.clone()), "{records}");
            assert_eq!(journal.last(), (records > 0).then(|| record(records)).as_ref());
            let known = (1..=records).filter(|&number| journal.of(AttemptId([number; 16])).is_some()).count();
            assert_eq!(known, usize::from(records).min(SLOTS));
        }
    }

    #[test]
    fn a_record_that_was_not_added_is_overwritten_by_the_next() {
        let (mut file, mut journal) = written(3);
        put(&mut file, &journal, &record(100), WRITE_LEN);
        put(&mut file, &journal, &record(101), WRITE_LEN);
        journal.add(record(101));
        assert_eq!(Journal::read(&file), Ok(journal));
    }

    #[test]
    fn what_is_no_journal_of_this_version_is_told_apart() {
        let (file, _) = written(2);
        assert_eq!(Journal::read(&file[1..]), Err(JournalError::Foreign));
        assert_eq!(Journal::read(&vec![0; JOURNAL_LEN]), Err(JournalError::Foreign));
        assert_eq!(Journal::read(&vec![b'x'; JOURNAL_LEN]), Err(JournalError::Foreign));
        let mut other = file.clone();
        (other[40], other[COPY_LEN + 40]) = (7, 7);
        assert_eq!(Journal::read(&other), Err(JournalError::Version { theirs: 7 }));
        let long = Record { peer: "x".repeat(PEER_MAX + 1), ..record(1) };
        assert_eq!(Journal::empty().write(&long), Err(JournalError::Peer(PEER_MAX + 1)));
    }

    #[test]
    fn a_file_of_the_version_without_identities_is_read_and_written_on() {
        let without = |number: u8| Record { identity: None, ..record(number) };
        let (mut file, mut journal) = (blank(), Journal::empty());
        for number in 1..=3 {
            put(&mut file, &journal, &without(number), WRITE_LEN);
            journal.add(without(number));
        }
        // As that version wrote it.
        let slots = (0..=3u64).map(|slot| SLOT_LEN * usize::try_from(slot).unwrap());
        for copy in slots.flat_map(|slot| [slot, slot + COPY_LEN]) {
            let mut block = Block::read(&file[copy..]);
            block.version = VERSION_WITHOUT_IDENTITY.into();
            file[copy..copy + size_of::<Block>()].copy_from_slice(block.sealed().as_bytes());
        }
        assert_eq!(Journal::read(&file), Ok(journal.clone()));
        let next = Record { identity: Some(Fingerprint([7; 32])), ..record(4) };
        put(&mut file, &journal, &next, WRITE_LEN);
        journal.add(next);
        assert_eq!(Journal::read(&file), Ok(journal));
    }

    /// The offset of a copy of a record.
    fn place(number: u8, copy: usize) -> usize {
        SLOT_LEN * (1 + slot_of(number.into())) + copy * COPY_LEN
    }

    #[test]
    fn a_record_that_was_whole_and_is_damaged_is_not_passed_over() {
        for (records, number) in [(1, 1), (3, 1), (3, 2), (3, 3), (20, 10), (20, 17), (20, 20)] {
            let (mut file, _) = written(records);
            (file[place(number, 0) + 60], file[place(number, 1) + 60]) = (9, 9);
            assert_eq!(
                Journal::read(&file),
                Err(JournalError::Damaged(slot_of(number.into()))),
                "{number} of {records}"
            );
        }
        for (records, number) in [(3, 1), (3, 2), (20, 7)] {
            let (mut file, _) = written(records);
            file[place(number, 0)..][..SLOT_LEN].fill(0);
            assert!(matches!(Journal::read(&file), Err(JournalError::Damaged(_))));
        }
    }

    #[test]
    fn an_address_is_kept_whatever_its_family() {
        for text in [
            "192.0.2.1:7837",
            "[2001:db8::1]:65535",
            "[fe80:1111:2222:3333:4444:5555:6666:7777%4294967295]:65535",
        ] {
            let address: SocketAddr = text.parse().unwrap();
            let (mut file, mut journal) = written(1);
            let next = Record { address: Some(address), ..record(2) };
            put(&mut file, &journal, &next, WRITE_LEN);
            journal.add(next);
            assert_eq!(Journal::read(&file).unwrap().last().unwrap().address, Some(address));
        }
    }

    proptest! {
        /// The disk may have kept any prefix of an interrupted write, or only its second copy.
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
            prop_assert_eq!(Journal::read(&file), Ok(journal));
        }

        /// Damage to the last record as well: it must not pass for the interrupted write of the next.
        #[test]
        fn a_record_with_one_damaged_block_is_read_from_its_copy(
            records in 1..40u8, back in 0..16u8, copy in 0..2usize, at in 0..size_of::<Block>(), noise in 1..=255u8,
        ) {
            let (mut file, journal) = written(records);
            let number = records.saturating_sub(back).max(1);
            file[place(number, copy) + at] ^= noise;
            prop_assert_eq!(Journal::read(&file), Ok(journal.clone()));
            file[place(number, copy)..][..COPY_LEN].fill(0);
            prop_assert_eq!(Journal::read(&file), Ok(journal.clone()));
            // Damage to both copies is detected.
            let other = 1 - copy;
            file[place(number, copy)] = noise;
            file[place(number, other) + at] ^= noise;
            prop_assert!(matches!(Journal::read(&file), Err(JournalError::Damaged(_))));
        }

        #[test]
        fn no_bytes_make_it_panic(at in 0..JOURNAL_LEN - 64, noise in prop::collection::vec(any::<u8>(), 64)) {
            let (mut file, _) = written(20);
            file[at..at + 64].copy_from_slice(&noise);
            let _ = Journal::read(&file);
        }
    }
}

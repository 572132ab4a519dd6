use crate::handover::{JOURNAL_LEN, Journal, Record, RecordKind, Side, WRITE_LEN};
use crate::wire::AttemptId;

/// The length of a copy's block, and of the digest before it.
const BLOCK_LEN: usize = WRITE_LEN - COPY_LEN;
const DIGEST_LEN: usize = 32;
const COPY_LEN: usize = 4096;
/// Where a block has the number of its record.
const NUMBER: std::ops::Range<usize> = 48..56;

/// A state file with as many records as the first byte says, then changed: where in which copy (three bytes,
/// the highest bit for a new digest) and to what (a length and as many bytes).
pub fn state_file(input: &[u8]) {
    let Some((&records, mut changes)) = input.split_first() else { return };
    let (mut file, _) = written(records % 40);
    let mut numbers_changed = false;
    while let [copy, low, high, len, rest @ ..] = changes {
        let start = usize::from(copy & 0x7f) * COPY_LEN;
        let at = usize::from(u16::from_le_bytes([*low, *high])) % BLOCK_LEN;
        let (bytes, next) = rest.split_at(rest.len().min(usize::from(*len)));
        let bytes = &bytes[..bytes.len().min(BLOCK_LEN - at)];
        changes = next;
        let Some(block) = file.get_mut(start..start + BLOCK_LEN) else { continue };
        block[at..at + bytes.len()].copy_from_slice(bytes);
        numbers_changed |= at < NUMBER.end && NUMBER.start < at + bytes.len();
        if copy & 0x80 != 0 {
            let digest = *blake3::hash(&block[DIGEST_LEN..]).as_bytes();
            block[..DIGEST_LEN].copy_from_slice(&digest);
        }
    }
    let Ok(mut journal) = Journal::read(&file) else { return };
    put(&mut file, &mut journal, 7);
    // A sequence that is believed takes the next record, unless its numbers come from elsewhere and are at
    // their end.
    assert!(numbers_changed || Journal::read(&file) == Ok(journal));
}

fn written(records: u8) -> (Vec<u8>, Journal) {
    let (mut file, mut journal) = (vec![0; JOURNAL_LEN], Journal::empty());
    file[..WRITE_LEN].copy_from_slice(&Journal::head());
    (0..records).for_each(|number| put(&mut file, &mut journal, number));
    (file, journal)
}

fn put(file: &mut [u8], journal: &mut Journal, number: u8) {
    let kind = [RecordKind::Prepared, RecordKind::Running, RecordKind::Refused][usize::from(number) % 3];
    let peer = "host-a:7837".repeat(usize::from(number) % 4);
    let address = number.is_multiple_of(2).then(|| ([192, 0, 2, number], 7837).into());
    let record = Record {
        mark: kind,
        side: Side::Destination,
        attempt_id: AttemptId([number; 16]),
        peer,
        address,
        identity: None,
    };
    let (at, bytes) = journal.write(&record).expect("a short name");
    let at = usize::try_from(at).expect("within the file");
    file[at..at + bytes.len()].copy_from_slice(&bytes);
    journal.add(record);
}

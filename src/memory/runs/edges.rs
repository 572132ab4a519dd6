//! Runs in words that are mostly not zero.

use std::fmt;

/// Buffer for the positions at which the runs of a stripe begin and end: 8 KiB that a lane allocates once a
/// round and lends for each stripe.
///
/// If most words are not zero, the positions at which bits change are written first, for all words and
/// without testing how many each word has. So no branch depends on their number or on the lengths of runs,
/// which a processor cannot predict when pages are dirty at random.
pub struct RunEdges {
    /// Positions in bits at which runs begin and, in turn, end; arbitrary values after the last one found.
    places: [u16; PLACES],
}

/// The most words to find edges in.
const WORDS_MAX: usize = 64;

const PLACES: usize = PLACES_MASK + 1 + WORD_PLACES;

/// Keeps the index of a word's first position in bounds without a branch: at most one position precedes it
/// for each bit.
const PLACES_MASK: usize = WORDS_MAX * 64 - 1;

/// Space for a word: a position for each bit, and one block more, because a whole block is written at once.
type WordRoom = [u16; WORD_PLACES];
const WORD_PLACES: usize = 64 + AT_ONCE;

/// Positions that are written at once, even if fewer are valid.
const AT_ONCE: usize = 8;

impl RunEdges {
    /// The positions in bits at which each run of at most [`WORDS_MAX`] words begins and ends.
    pub(super) fn find(&mut self, words: &[u64]) -> &[[u16; 2]] {
        // The positions of more words would be overwritten.
        assert!(words.len() <= WORDS_MAX, "a stripe has {WORDS_MAX} words");
        let mut found = if are_crowded(words) { self.find_many(words) } else { self.find_few(words) };
        if words.last().is_some_and(|word| word >> 63 == 1) {
            self.places[found] = bits_of(words);
            found += 1;
        }
        self.places[..found].as_chunks().0
    }

    /// Finds the edges of words that mostly have many; returns their number.
    fn find_many(&mut self, words: &[u64]) -> usize {
        let (mut found, mut last_bit) = (0, 0);
        let mut begin = places_from(0);
        for &word in words {
            found += many(edges(word, last_bit), begin, self.room(found));
            last_bit = word >> 63;
            begin = later(begin, 64);
        }
        found
    }

    /// Finds the edges of words that mostly have few or none; returns their number.
    fn find_few(&mut self, words: &[u64]) -> usize {
        let (mut found, mut last_bit) = (0, 0);
        let mut begin = 0;
        for group in words.chunks(4) {
            let all_alike = u64::wrapping_neg(last_bit);
            if group.iter().fold(0, |differing, word| differing | (word ^ all_alike)) == 0 {
                begin += bits_of(group);
                continue;
            }
            for &word in group {
                found += few(edges(word, last_bit), begin, self.room(found));
                last_bit = word >> 63;
                begin += 64;
            }
        }
        found
    }

    /// Space for the edges of a word after the first `found` edges.
    fn room(&mut self, found: usize) -> &mut WordRoom {
        let room = self.places[found & PLACES_MASK..].first_chunk_mut();
        room.expect("behind the last bit, too, there is room for a word")
    }
}

impl Default for RunEdges {
    fn default() -> Self {
        Self { places: [0; PLACES] }
    }
}

impl fmt::Debug for RunEdges {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RunEdges").finish_non_exhaustive()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a stripe has 4,096 bits")]
fn bits_of(words: &[u64]) -> u16 {
    words.len() as u16 * 64
}

/// Whether words have more than two edges on average, judged by every eighth word.
fn are_crowded(words: &[u64]) -> bool {
    let (edges, sampled) = words
        .iter()
        .step_by(8)
        .fold((0, 0), |(edges, sampled), word| (edges + (word ^ word << 1).count_ones(), sampled + 1));
    edges > 2 * sampled
}

/// A bit is set where it differs from the bit before.
fn edges(word: u64, last_bit: u64) -> u64 {
    word ^ (word << 1 | last_bit)
}

/// Writes the positions of the bits set in `edges`, counted from `begin`; returns their number.
#[inline]
fn few(edges: u64, begin: u16, room: &mut WordRoom) -> usize {
    let (mut rest, mut count) = (edges, 0);
    for place in &mut room[..4] {
        *place = begin + lowest(rest);
        count += usize::from(rest != 0);
        rest &= rest.wrapping_sub(1);
    }
    if rest == 0 { count } else { many(edges, places_from(begin), room) }
}

/// The position of the lowest set bit; 64 if none is set.
#[expect(clippy::cast_possible_truncation, reason = "at most 64")]
fn lowest(bits: u64) -> u16 {
    bits.trailing_zeros() as u16
}

/// As [`few`], for a word with many edges.
#[inline]
fn many(edges: u64, begin: [u16; AT_ONCE], room: &mut WordRoom) -> usize {
    let count = in_chunks::<CHUNK_BITS>(edges, begin, room);
    if count < usize::from(TOO_MANY) { count } else { in_bytes(edges, begin, room) }
}

/// As [`many`], with chunks of eight bits, which never have too many set.
#[cold]
#[inline(never)]
fn in_bytes(edges: u64, begin: [u16; AT_ONCE], room: &mut WordRoom) -> usize {
    in_chunks::<8>(edges, begin, room)
}

/// As [`many`], with chunks of `BITS` bits; returns [`TOO_MANY`] or more if a chunk has more than [`AT_ONCE`]
/// set.
#[inline(always)]
fn in_chunks<const BITS: u16>(edges: u64, mut begin: [u16; AT_ONCE], room: &mut WordRoom) -> usize {
    let mut count = 0;
    for index in 0..64u16.div_ceil(BITS) {
        let chunk = chunk::<BITS>(edges >> (index * BITS));
        let places = room[count & 63..].first_chunk_mut::<AT_ONCE>();
        let places = places.expect("there is room for so many behind the last bit of a word");
        for (place, (begin, &clear)) in places.iter_mut().zip(begin.iter().zip(&CLEAR_BEFORE[chunk])) {
            *place = begin.wrapping_add(clear.into());
        }
        count += usize::from(COUNTS[chunk]);
        begin = later(begin, BITS);
    }
    count
}

/// The positions of the first set bits if no clear bit came before them: [`CLEAR_BEFORE`] is added to these.
fn places_from(begin: u16) -> [u16; AT_ONCE] {
    later([0, 1, 2, 3, 4, 5, 6, 7], begin)
}

fn later(places: [u16; AT_ONCE], bits: u16) -> [u16; AT_ONCE] {
    places.map(|place| place.wrapping_add(bits))
}

/// Bits of one table look-up. The tables take 18 KiB; with one more bit they would exceed the first-level
/// cache.
const CHUNK_BITS: u16 = 11;

/// The lowest `BITS` bits.
#[expect(clippy::cast_possible_truncation, reason = "at most 11 bits")]
fn chunk<const BITS: u16>(bits: u64) -> usize {
    bits as usize & ((1 << BITS) - 1)
}

/// For each of the first set bits of a chunk, [`COUNTS`] in number, how many clear bits precede it; arbitrary
/// values after them.
// A table of plain positions would need less code. But then one number is added to all eight, and compilers
// broadcast it anew for each chunk.
static CLEAR_BEFORE: [[u8; AT_ONCE]; 1 << CHUNK_BITS] = {
    let mut table = [[0; AT_ONCE]; 1 << CHUNK_BITS];
    let mut chunk = 0;
    while chunk < table.len() {
        let (mut bit, mut set, mut clear) = (0, 0, 0);
        while bit < CHUNK_BITS && set < AT_ONCE {
            if chunk >> bit & 1 == 1 {
                table[chunk][set] = clear;
                set += 1;
            } else {
                clear += 1;
            }
            bit += 1;
        }
        chunk += 1;
    }
    table
};

/// The number of set bits of a chunk, or [`TOO_MANY`].
static COUNTS: [u8; 1 << CHUNK_BITS] = {
    let mut table = [0; 1 << CHUNK_BITS];
    let mut chunk: usize = 1;
    while chunk < table.len() {
        // One more than without the lowest set bit.
        let others = table[chunk & (chunk - 1)];
        table[chunk] = if (others as usize) < AT_ONCE { others + 1 } else { TOO_MANY };
        chunk += 1;
    }
    table
};

/// Replaces a count: more than the bits of a word, so that sums show it.
const TOO_MANY: u8 = 128;

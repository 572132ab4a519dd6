//! Where most words have something in them.

use std::fmt;

/// Room for where the runs of a stripe begin and end: 8 KiB that a lane makes once a round and lends for each stripe.
///
/// Where most words have something in them, the places at which bits change are written down first, for all words and without asking
/// how many there are in each. So neither their number nor the lengths of runs, which no processor foresees where pages are dirty at
/// random, decides a branch.
pub struct RunEdges {
    /// Where runs begin and, in turn, end, in bits; behind those that were found, anything.
    places: [u16; PLACES],
}

/// The most words of which edges are found.
const WORDS_MAX: usize = 64;

const PLACES: usize = PLACES_MASK + 1 + WORD_PLACES;

/// Keeps the index of a word's first place in bounds without a branch: there are at most as many before it as bits.
const PLACES_MASK: usize = WORDS_MAX * 64 - 1;

/// Room for a word: a place for each bit, and as many more as are written at once.
type WordRoom = [u16; WORD_PLACES];
const WORD_PLACES: usize = 64 + AT_ONCE;

/// Places that are written at once, whether there are so many or fewer.
const AT_ONCE: usize = 8;

impl RunEdges {
    /// Where each run of at most [`WORDS_MAX`] words begins and where it ends, in bits.
    pub(super) fn find(&mut self, words: &[u64]) -> &[[u16; 2]] {
        // More would be forgotten.
        assert!(words.len() <= WORDS_MAX, "a stripe has {WORDS_MAX} words");
        let mut found = if are_crowded(words) { self.find_many(words) } else { self.find_few(words) };
        if words.last().is_some_and(|word| word >> 63 == 1) {
            self.places[found] = bits_of(words);
            found += 1;
        }
        self.places[..found].as_chunks().0
    }

    /// Finds the edges, of which most words have many; returns how many there are.
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

    /// Finds the edges, of which most words have a few or none; returns how many there are.
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

    /// Room for the edges of a word that come after so many others.
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

/// Whether words have more than two edges, by every eighth of them.
fn are_crowded(words: &[u64]) -> bool {
    let (edges, sampled) = words
        .iter()
        .step_by(8)
        .fold((0, 0), |(edges, sampled), word| (edges + (word ^ word << 1).count_ones(), sampled + 1));
    edges > 2 * sampled
}

/// Set where a bit differs from the one before it.
fn edges(word: u64, last_bit: u64) -> u64 {
    word ^ (word << 1 | last_bit)
}

/// Writes down where the bits are that are set in `edges`, counted from `begin`; returns how many.
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

/// Which bit is the lowest one that is set; 64 if none is.
#[expect(clippy::cast_possible_truncation, reason = "at most 64")]
fn lowest(bits: u64) -> u16 {
    bits.trailing_zeros() as u16
}

/// The same, for a word that has many.
#[inline]
fn many(edges: u64, begin: [u16; AT_ONCE], room: &mut WordRoom) -> usize {
    let count = in_chunks::<CHUNK_BITS>(edges, begin, room);
    if count < usize::from(TOO_MANY) { count } else { in_bytes(edges, begin, room) }
}

/// The same, eight bits at a time, of which none are too many.
#[cold]
#[inline(never)]
fn in_bytes(edges: u64, begin: [u16; AT_ONCE], room: &mut WordRoom) -> usize {
    in_chunks::<8>(edges, begin, room)
}

/// The same, so many bits at a time; [`TOO_MANY`] or more if of those more than [`AT_ONCE`] are set.
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

/// Where the first set bits would be if none were clear before them: what [`CLEAR_BEFORE`] is added to.
fn places_from(begin: u16) -> [u16; AT_ONCE] {
    later([0, 1, 2, 3, 4, 5, 6, 7], begin)
}

fn later(places: [u16; AT_ONCE], bits: u16) -> [u16; AT_ONCE] {
    places.map(|place| place.wrapping_add(bits))
}

/// Bits that are looked up at once. The tables take 18 KiB; for one bit more they would not fit the first cache.
const CHUNK_BITS: u16 = 11;

/// The lowest bits.
#[expect(clippy::cast_possible_truncation, reason = "at most 11 bits")]
fn chunk<const BITS: u16>(bits: u64) -> usize {
    bits as usize & ((1 << BITS) - 1)
}

/// How many bits of a chunk are clear before each of the first that are set, [`COUNTS`] of them; then anything.
// A table of bare places would say the same with less. But then one number is added to all eight, and compilers make eight of it anew
// for each chunk.
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

/// How many bits of a chunk are set, or [`TOO_MANY`].
static COUNTS: [u8; 1 << CHUNK_BITS] = {
    let mut table = [0; 1 << CHUNK_BITS];
    let mut chunk: usize = 1;
    while chunk < table.len() {
        // As many as without the lowest of them, and one.
        let others = table[chunk & (chunk - 1)];
        table[chunk] = if (others as usize) < AT_ONCE { others + 1 } else { TOO_MANY };
        chunk += 1;
    }
    table
};

/// In the place of a count: more than a word has bits, so that sums tell.
const TOO_MANY: u8 = 128;

//! Where most words have something in them.

/// Finds where bits change, which is where runs begin and end, for some words before it gives out any run.
///
/// The places are written down without asking how many there are in a word. So neither their number nor the lengths of runs, which
/// no processor foresees where pages are dirty at random, decides a branch.
#[derive(Clone, Debug)]
pub(super) struct DenseRuns<'bitmap> {
    /// The words that were not looked at.
    words: &'bitmap [u64],
    /// The last bit of the word before them.
    last_bit: u64,
    /// Where they begin, in bits, eight times: it is added to eight places at once.
    begin: [u16; 8],
    /// Where runs begin and, in turn, end, in bits: `places[given..found]` are to come.
    places: [u16; PLACES],
    given: usize,
    found: usize,
}

/// Words that are looked at together.
const GROUP_WORDS: usize = 4;

/// With so many places found, no further group is looked at.
const ENOUGH: usize = 64;

/// A power of two, so that a place's index is kept in bounds by a mask, and eight, as all eight of a byte are always written.
const PLACES: usize = PLACES_MASK + 1 + 8;
const PLACES_MASK: usize = (ENOUGH + GROUP_WORDS * 64).next_power_of_two() - 1;

impl<'bitmap> DenseRuns<'bitmap> {
    /// Of at most 1,023 words: places have 16 bits.
    pub(super) fn new(words: &'bitmap [u64]) -> Self {
        debug_assert!(words.len() < 1024);
        Self { words, last_bit: 0, begin: [0; 8], places: [0; PLACES], given: 0, found: 0 }
    }

    /// Finds more places; false if there are none. Then the last run has been given out.
    #[inline(never)]
    fn look(&mut self) -> bool {
        // What was not given out is at most a run that has begun.
        let mut found = self.found - self.given;
        self.places[0] = self.places[self.given];
        while found < ENOUGH && !self.words.is_empty() {
            let (group, rest) = self.words.split_at(self.words.len().min(GROUP_WORDS));
            self.words = rest;
            let all_alike = self.last_bit.wrapping_neg();
            if group.iter().fold(0, |differing, word| differing | (word ^ all_alike)) == 0 {
                group.iter().for_each(|_| self.begin = later(self.begin, 64));
            } else {
                found = self.look_at(group, found);
            }
        }
        if self.words.is_empty() && self.last_bit == 1 {
            self.last_bit = 0;
            self.places[found] = self.begin[0];
            found += 1;
        }
        (self.given, self.found) = (0, found);
        found > 0
    }

    /// Puts the places in these words behind `found` others; returns how many there are then.
    #[inline]
    fn look_at(&mut self, group: &[u64], mut found: usize) -> usize {
        let mut begin = self.begin;
        for &word in group {
            let first = word ^ (word << 1 | self.last_bit);
            self.last_bit = word >> 63;
            let [second, third, fourth] =
                [without(first), without(without(first)), without(without(without(first)))];
            if without(fourth) == 0 {
                let space = &mut self.places[found & PLACES_MASK..][..4];
                for (place, bits) in space.iter_mut().zip([first, second, third, fourth]) {
                    *place = begin[0] + lowest(bits);
                    found += usize::from(bits != 0);
                }
                begin = later(begin, 64);
                continue;
            }
            for byte in first.to_le_bytes().map(usize::from) {
                let space = &mut self.places[found & PLACES_MASK..][..8];
                for (place, (begin, bit)) in space.iter_mut().zip(begin.iter().zip(SET_BITS[byte])) {
                    *place = begin + bit;
                }
                found += COUNTS[byte];
                begin = later(begin, 8);
            }
        }
        self.begin = begin;
        found
    }
}

impl Iterator for DenseRuns<'_> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        if self.given + 1 >= self.found && !self.look() {
            return None;
        }
        let [first, end] = [self.places[self.given], self.places[self.given + 1]];
        self.given += 2;
        Some((u64::from(first), u64::from(end - first)))
    }

    #[inline]
    fn fold<B, F: FnMut(B, (u64, u64)) -> B>(mut self, init: B, mut f: F) -> B {
        let mut folded = init;
        loop {
            let (runs, open) = self.places[self.given..self.found].as_chunks();
            for &[first, end] in runs {
                folded = f(folded, (u64::from(first), u64::from(end - first)));
            }
            self.given = self.found - open.len();
            if !self.look() {
                return folded;
            }
        }
    }
}

/// Which bit is the lowest one that is set; 64 if none is.
#[expect(clippy::cast_possible_truncation, reason = "at most 64")]
fn lowest(bits: u64) -> u16 {
    bits.trailing_zeros() as u16
}

/// The bits without the lowest one that is set.
fn without(bits: u64) -> u64 {
    bits & bits.wrapping_sub(1)
}

fn later(begin: [u16; 8], bits: u16) -> [u16; 8] {
    begin.map(|begin| begin.wrapping_add(bits))
}

/// Which bits of each byte are set: first those, [`COUNTS`] of them, then anything.
static SET_BITS: [[u16; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut bit, mut index) = (0, 0);
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                table[byte][index] = bit;
                index += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    table
};

/// How many bits of each byte are set.
static COUNTS: [usize; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = byte.count_ones() as usize;
        byte += 1;
    }
    table
};

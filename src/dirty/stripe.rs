//! A piece of guest RAM that always travels on the same lane.

use crate::memory::{RunEdges, Runs};

/// Pages in a stripe: 16 MiB of guest RAM, with 64 words of bitmap.
///
/// Small enough that the lanes of a small guest share the work evenly; large enough that, with scattered
/// dirty pages, most stripes have dirty pages, which the branch predictor can foresee.
pub const STRIPE_PAGES: u64 = STRIPE_WORDS as u64 * 64;

/// Words in the bitmap of a stripe.
pub(super) const STRIPE_WORDS: usize = 64;

/// The most words of a stripe that are cleared at once if much is dirty: 4 MiB of guest RAM.
const PART_WORDS: usize = 16;

/// A piece of guest RAM that always travels on the same lane, and its dirty pages.
#[derive(Clone, Copy, Debug)]
pub struct Stripe<'bitmap> {
    /// Index of the region.
    pub region: usize,
    /// First page, counted from the region's start. A multiple of 4,096, or of 1,024 in a
    /// [part](Self::parts).
    pub first_page: u64,
    /// A bit for each of its pages: [`STRIPE_PAGES`], or fewer at the region's end.
    pub words: &'bitmap [u64],
    /// Which of the words are not zero.
    pub(super) nonzero: u64,
}

impl<'bitmap> Stripe<'bitmap> {
    /// The runs of its dirty pages, counted from its first page.
    pub fn runs<'runs>(&self, edges: &'runs mut RunEdges) -> Runs<'runs>
    where
        'bitmap: 'runs,
    {
        Runs::of_stripe(self.words, self.nonzero, edges)
    }

    /// How many of its pages are dirty.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        let (mut nonzero, mut pages) = (self.nonzero, 0);
        while nonzero != 0 {
            pages += u64::from(self.words[nonzero.trailing_zeros() as usize].count_ones());
            nonzero &= nonzero - 1;
        }
        pages
    }

    /// The parts that should be cleared at once: the whole stripe, or, where more than 4 MiB are dirty, the
    /// dirty pages of each 4 MiB. So a page is read soon after it is cleared, and few are written again in
    /// between. Where little is dirty, `KVM_CLEAR_DIRTY_LOG` is called rarely: on processors that log pages
    /// themselves, it stops all vCPUs.
    pub fn parts(self) -> impl Iterator<Item = Stripe<'bitmap>> {
        let words = if self.dirty_pages() > PART_WORDS as u64 * 64 { PART_WORDS } else { STRIPE_WORDS };
        let part = move |(index, part)| Stripe {
            first_page: self.first_page + (index * words * 64) as u64,
            words: part,
            nonzero: self.nonzero >> (index * words) & u64::MAX >> (64 - words),
            ..self
        };
        self.words.chunks(words).enumerate().map(part).filter(|part| part.nonzero != 0)
    }
}

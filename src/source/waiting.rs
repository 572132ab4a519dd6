//! Hot pages, which wait for the last round instead of being sent in each.
//!
//! A page that the guest writes over and over is dirty at the end of every round, so sending it while the
//! guest runs is in vain. Three rules keep each page:
//!
//! - a page that waits is dirty, and only a pass while the guest runs leaves it out;
//! - after that pass it is marked dirty again, whatever the harvest has found;
//! - the last pass leaves nothing out.

use std::mem;
use std::time::Duration;

use crate::dirty::DirtyBitmap;
use crate::memory::RamLayout;

/// The pages that wait, and the harvests that tell which are hot.
///
/// A page is hot if the guest wrote it in this period and in the one before. A period is a round, or as many
/// short ones as take the time in which the waiting pages could have been sent: a page that is not written
/// again in that time would have been worth sending.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Left for the last round.
    pages: DirtyBitmap,
    /// Written in the period before.
    before: DirtyBitmap,
    /// Written in this period.
    written: DirtyBitmap,
    /// How long this period has lasted.
    lasted: Duration,
    #[cfg(test)]
    forgets: bool,
}

impl Waiting {
    /// No page waits.
    pub(super) fn new(layout: &RamLayout) -> Self {
        let empty = DirtyBitmap::new(layout);
        Self {
            pages: empty.clone(),
            before: empty.clone(),
            written: empty,
            lasted: Duration::ZERO,
            #[cfg(test)]
            forgets: mutant::forgets(),
        }
    }

    /// The pages that wait.
    pub(super) fn pages(&self) -> &DirtyBitmap {
        &self.pages
    }

    /// How many of the waiting pages were written again in this period.
    pub(super) fn written_again(&self) -> u64 {
        self.pages.common(&self.written)
    }

    /// Leaves the waiting pages out of a pass over the `dirty` ones.
    pub(super) fn leave_out(&self, dirty: &mut DirtyBitmap) {
        dirty.remove(&self.pages);
    }

    /// Takes note of a harvest, and adds the waiting pages to it; returns how many of these were not in it.
    pub(super) fn harvested(&mut self, dirty: &mut DirtyBitmap) -> u64 {
        self.written.join(dirty);
        let unwritten = self.pages.count() - self.pages.common(dirty);
        #[cfg(test)]
        if self.forgets {
            return unwritten;
        }
        dirty.join(&self.pages);
        unwritten
    }

    /// A round of so long a time is over. At the end of a period, chooses anew which of the `dirty` pages
    /// wait: the hot ones, if these are at most `pages_max`. Returns how many percent of the period's pages
    /// were written in the one before too, or of that one's if it had fewer.
    pub(super) fn round_ended(
        &mut self,
        dirty: &DirtyBitmap,
        round: Duration,
        bounds: WaitingBounds,
    ) -> Option<u8> {
        self.lasted += round;
        if self.pages.count() > bounds.pages_max {
            self.pages.clear();
        }
        if self.lasted < bounds.sending(self.pages.count()) {
            return None;
        }
        self.lasted = Duration::ZERO;
        let fewer = self.before.count().min(self.written.count());
        self.before.keep(&self.written);
        let rewritten = (100 * self.before.count()).checked_div(fewer);
        self.before.keep(dirty);
        // The bitmap of the period before becomes that of the waiting pages, and the other way around.
        mem::swap(&mut self.pages, &mut self.before);
        mem::swap(&mut self.before, &mut self.written);
        self.written.clear();
        if self.pages.count() > bounds.pages_max {
            self.pages.clear();
        }
        rewritten.and_then(|percent| u8::try_from(percent).ok())
    }

    /// What was learned no longer holds: no page waits.
    pub(super) fn begin_anew(&mut self) {
        self.pages.clear();
        self.before.clear();
        self.written.clear();
        self.lasted = Duration::ZERO;
    }
}

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WaitingBounds {
    /// So many pages at the most.
    pub(super) pages_max: u64,
    /// Pages a second that the link carries.
    pub(super) pages_per_second: f64,
}

impl WaitingBounds {
    /// How long sending so many pages takes.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn sending(self, pages: u64) -> Duration {
        let seconds = if pages == 0 { 0.0 } else { pages as f64 / self.pages_per_second };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// A defect that tests plant: waiting pages are forgotten.
#[cfg(test)]
pub(crate) mod mutant {
    use std::cell::Cell;

    thread_local! {
        static FORGETS: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn forgets() -> bool {
        FORGETS.get()
    }

    /// Migrations that this thread begins from now on forget them, or not.
    pub(crate) fn plant(forgets: bool) {
        FORGETS.set(forgets);
    }
}

#[cfg(test)]
mod tests;

//! What rounds show of a guest whose VMM names the pages to send.

use std::time::Duration;

use super::history::History;

impl History {
    /// How long nothing is sent for each page that a VMM names, in seconds: by the latest rounds, without the
    /// first, in which the VMM also passes over pages that were never written.
    pub(super) fn naming_seconds(&self) -> f64 {
        let named = self.rounds().iter().skip(1).rev().filter(|round| round.named_pages > 0).take(3);
        let (pages, time) = named.fold((0, Duration::ZERO), |(pages, time), round| {
            (pages + round.named_pages, time + round.naming)
        });
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let pages = pages as f64;
        if pages > 0.0 { time.as_secs_f64() / pages } else { 0.0 }
    }

    /// The share of the pages written in a round that the guest writes in each round, by the last two: the
    /// less of both. `None` where looks show more, or before that is known.
    pub(super) fn rewritten_share(&self) -> Option<f64> {
        let [before, last] = self.rounds().last_chunk()?;
        Some(f64::from(before.rewritten_percent?.min(last.rewritten_percent?)) / 100.0)
    }
}

//! The guest's pages at the source: dirty pages, pages sent, and blocks that both ends have compared.

use std::time::Instant;

use super::error::MigrationFailure;
use super::migration::{Connected, Migration};
use crate::convergence::{LaneLoad, Round};
use crate::dirty::{DirtyBitmap, DirtyError, Stripes};
use crate::memory::PAGE_BYTES;
use crate::progress::{LaneReport, RoundReport, mbps, ms};
use crate::session::{Link, SendGate};
use crate::verify::{SourceDigests, Verify};

/// The pages of one attempt.
pub(super) struct Pages {
    pub(super) dirty: DirtyBitmap,
    stripes: Stripes,
    /// The blocks of RAM with digests at the destination.
    pub(super) digests: SourceDigests,
    /// The pages sent, round by round.
    pub(super) rounds: Vec<RoundReport>,
    /// Zero pages, which are not sent.
    pub(super) zero: u64,
    /// When a lane took the first page.
    pub(super) first_page: Option<Instant>,
}

impl Pages {
    /// All dirty, none sent.
    pub(super) fn new(link: &Link, verify: Verify) -> Self {
        let layout = link.ram.layout();
        let mut dirty = DirtyBitmap::new(&layout);
        dirty.fill();
        Self {
            dirty,
            stripes: Stripes::new(link.lanes.into()),
            digests: SourceDigests::new(&layout, verify),
            rounds: Vec::new(),
            zero: 0,
            first_page: None,
        }
    }

    /// All dirty, none sent, in a new attempt.
    pub(super) fn begin_anew(&mut self, link: &Link, verify: Verify) {
        self.digests = SourceDigests::new(&link.ram.layout(), verify);
        (self.rounds, self.zero, self.first_page) = (Vec::new(), 0, None);
        self.dirty.fill();
    }

    /// Adds the guest's writes since the last harvest.
    pub(super) fn harvest(&mut self, connected: &Connected) -> Result<(), DirtyError> {
        self.dirty.by(&connected.link.pool, |dirty| dirty.harvest(&*connected.log))?;
        Ok(())
    }

    /// Clears the pages that were sent, and harvests; returns how many pages are dirty then.
    pub(super) fn harvest_anew(&mut self, connected: &Connected) -> Result<u64, DirtyError> {
        let dirty_pages = self.dirty.by(&connected.link.pool, |dirty| {
            dirty.clear();
            dirty.harvest(&*connected.log)
        })?;
        self.digests.harvested(&self.dirty);
        Ok(dirty_pages)
    }

    /// The number of the latest round, from 1.
    pub(super) fn round_number(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    /// Sends the dirty pages and closes the round; returns the lanes' measurements. While the guest runs, the
    /// pages are tracked again, and the time limit may end the round.
    pub(super) fn send_round(
        &mut self,
        Migration { options, started, .. }: Migration<'_>,
        connected: &mut Connected,
        (is_running, throttle_percent): (bool, u8),
    ) -> Result<Round, MigrationFailure> {
        let began = Instant::now();
        let number = self.round_number() + 1;
        let check = || {
            options.cancel.check()?;
            if is_running { options.limits.check_time(started) } else { Ok(()) }
        };
        let gate = SendGate { pace: options.limits.pace(), check: &check };
        let log = is_running.then_some(&*connected.log);
        let sent = connected.link.send_round(number, (&self.dirty, &self.stripes), log, gate)?;
        self.zero += sent.zero_pages;
        self.first_page = self.first_page.or(sent.first_page);
        let mut round = Round { lanes: sent.lanes, duration: began.elapsed(), ..Round::default() };
        let waited = connected.link.transport.waited();
        round.overhead = round.duration.saturating_sub(round.busy() + waited);
        let lane = |lane: &LaneLoad| LaneReport { bytes: lane.bytes, busy_ms: ms(lane.busy) };
        self.rounds.push(RoundReport {
            pages: sent.pages,
            bytes: sent.pages * PAGE_BYTES,
            ms: ms(round.duration),
            bandwidth_mbps: mbps(round.sent_bytes(), round.busy()),
            throttle_percent,
            lanes: round.lanes.iter().map(lane).collect(),
            ..RoundReport::default()
        });
        Ok(round)
    }
}

//! The guest's pages at the source: dirty pages, pages sent, and blocks that both ends have compared.

use std::thread;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::error::MigrationFailure;
use super::inside::{LookInside, Looks};
use super::migration::{Connected, Migration};
use super::waiting::{Waiting, WaitingBounds};
use crate::convergence::{DirtySample, Inside, LaneLoad, Round};
use crate::dirty::{DirtyBitmap, DirtyError, InitiallyDirty, Stripe, Stripes};
use crate::memory::PAGE_BYTES;
use crate::progress::{LaneReport, RoundReport, mbps, ms};
use crate::session::{Link, Pass, PassProgress, SendGate};
use crate::verify::{SourceDigests, Verify};

/// The pages of one attempt.
pub(super) struct Pages {
    pub(super) dirty: DirtyBitmap,
    /// The dirty pages that are left for the last round, once a round has ended.
    waiting: Option<Waiting>,
    /// A second bitmap, for the pages that a VMM names while the guest is saved; empty.
    spare: Option<DirtyBitmap>,
    stripes: Stripes,
    /// The blocks of RAM with digests at the destination.
    pub(super) digests: SourceDigests,
    /// The pages sent, round by round.
    pub(super) rounds: Vec<RoundReport>,
    /// Zero pages, which are not sent.
    pub(super) zero: u64,
    /// When a lane took the first page.
    pub(super) first_page: Option<Instant>,
    initially: InitiallyDirty,
    /// How many passes were made over dirty pages. A round has one, or several if the log learns of writes
    /// bit by bit.
    passes: u32,
    /// Whether the next pass begins a round.
    begins_round: bool,
}

impl Pages {
    /// None sent.
    pub(super) fn new(link: &Link, verify: Verify) -> Self {
        let layout = link.ram.layout();
        Self {
            dirty: DirtyBitmap::new(&layout),
            waiting: None,
            spare: None,
            stripes: Stripes::new(link.lanes.into()),
            digests: SourceDigests::new(&layout, verify),
            rounds: Vec::new(),
            zero: 0,
            first_page: None,
            initially: InitiallyDirty::All,
            passes: 0,
            begins_round: true,
        }
    }

    /// None sent, in a new attempt.
    pub(super) fn begin_anew(&mut self, link: &Link, verify: Verify) {
        self.digests = SourceDigests::new(&link.ram.layout(), verify);
        (self.rounds, self.zero, self.first_page, self.passes) = (Vec::new(), 0, None, 0);
        self.dirty.clear();
        self.none_wait();
    }

    /// The log records from now on.
    pub(super) fn begin(&mut self, initially: InitiallyDirty, link: &Link) {
        self.initially = initially;
        // Before the guest is paused: the allocation takes time.
        self.spare = self.are_named().then(|| DirtyBitmap::new(&link.ram.layout()));
        match initially {
            InitiallyDirty::All => self.dirty.fill(),
            InitiallyDirty::AsNamed => self.dirty.clear(),
        }
    }

    /// Whether the VMM names the pages to send.
    pub(super) fn are_named(&self) -> bool {
        self.initially == InitiallyDirty::AsNamed
    }

    /// Adds the guest's writes since the last harvest.
    pub(super) fn harvest(&mut self, connected: &Connected) -> Result<(), DirtyError> {
        self.dirty.by(&connected.link.pool, |dirty| dirty.harvest(&*connected.log))?;
        Ok(())
    }

    /// Sets the dirty pages aside, with all that the VMM has named so far, so that those named from now on
    /// can be sent first; none if the VMM does not name pages.
    ///
    /// A VMM that comes to its pause names faster than pages are sent, and names most of these again.
    pub(super) fn set_aside(&mut self, connected: &Connected) -> Result<Option<DirtyBitmap>, DirtyError> {
        let Some(empty) = self.spare.take() else { return Ok(None) };
        self.harvest(connected)?;
        Ok(Some(std::mem::replace(&mut self.dirty, empty)))
    }

    /// Clears the pages that were sent, and harvests. Waiting pages stay dirty.
    pub(super) fn harvest_anew(&mut self, connected: &Connected) -> Result<Harvest, DirtyError> {
        let Connected { link, log, .. } = connected;
        let waiting = self.waiting.get_or_insert_with(|| Waiting::new(&link.ram.layout()));
        let (found_pages, unwritten_pages) = self.dirty.by(&link.pool, |dirty| {
            dirty.clear();
            let found_pages = dirty.harvest(&**log)?;
            Ok::<_, DirtyError>((found_pages, waiting.harvested(dirty)))
        })?;
        self.digests.harvested(&self.dirty);
        let waiting_pages = waiting.pages().count();
        Ok(Harvest { found_pages, dirty_pages: self.dirty.count(), waiting_pages, unwritten_pages })
    }

    /// How many pages wait for the last round.
    pub(super) fn waiting_pages(&self) -> u64 {
        self.waiting.as_ref().map_or(0, |waiting| waiting.pages().count())
    }

    /// How many of them were written again.
    pub(super) fn waiting_written_again(&self) -> u64 {
        self.waiting.as_ref().map_or(0, Waiting::written_again)
    }

    /// After a round of so long a time, chooses anew which dirty pages wait: at most `bytes_max`, on a link
    /// of this bandwidth. Returns how many percent of the round's pages were written in the one before too,
    /// where no look can show how fast the guest writes them.
    pub(super) fn choose_waiting(
        &mut self,
        connected: &Connected,
        round: Duration,
        (bytes_max, bandwidth): (f64, f64),
    ) -> Option<u8> {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let page_bytes = PAGE_BYTES as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        let pages_max = (bytes_max / page_bytes) as u64;
        // A VMM that names pages has a period of its own.
        let pages_per_second = if self.are_named() { f64::INFINITY } else { bandwidth / page_bytes };
        let bounds = WaitingBounds { pages_max, pages_per_second };
        let is_named = self.are_named();
        let waiting = self.waiting.as_mut()?;
        let rewritten =
            self.dirty.by(&connected.link.pool, |dirty| waiting.round_ended(dirty, round, bounds));
        if let Some(report) = self.rounds.last_mut() {
            report.waiting_pages = waiting.pages().count();
        }
        rewritten.filter(|_| is_named)
    }

    /// The next round leaves no page out, and which are hot is learned anew.
    pub(super) fn none_wait(&mut self) {
        if let Some(waiting) = &mut self.waiting {
            waiting.begin_anew();
        }
    }

    /// Leaves the waiting pages out of a pass, and has the log show whether they are written meanwhile.
    fn leave_waiting_out(&mut self, Connected { link, log, .. }: &Connected) -> Result<(), DirtyError> {
        let Some(waiting) = self.waiting.as_ref().filter(|waiting| waiting.pages().count() > 0) else {
            return Ok(());
        };
        let clear = |stripe: Stripe<'_>| log.clear(stripe.region, stripe.first_page, stripe.words);
        let (stripes, lanes) = (self.stripes, usize::from(link.lanes));
        let of_lane = |lane| stripes.of_lane(lane, waiting.pages());
        let clear_all = || (0..lanes).into_par_iter().try_for_each(|lane| of_lane(lane).try_for_each(clear));
        link.pool.install(clear_all)?;
        self.dirty.by(&link.pool, |dirty| waiting.leave_out(dirty));
        Ok(())
    }

    /// Watches for `time` what the guest writes; all pages that were dirty stay so.
    ///
    /// `None` if the VMM names the pages: it names them pass by pass, not as they are written.
    pub(super) fn look(
        &mut self,
        connected: &Connected,
        time: Duration,
    ) -> Result<Option<DirtySample>, DirtyError> {
        if self.are_named() {
            return Ok(None);
        }
        // So that the log shows anew which of the dirty pages are written.
        for part in Stripes::new(1).of_lane(0, &self.dirty).flat_map(Stripe::parts) {
            connected.log.clear(part.region, part.first_page, part.words)?;
        }
        let mut written = DirtyBitmap::new(&connected.link.ram.layout());
        let began = Instant::now();
        thread::sleep(time);
        let pages = written.by(&connected.link.pool, |written| written.harvest(&*connected.log))?;
        let sample = DirtySample { interval: began.elapsed(), dirty_bytes: pages * PAGE_BYTES };
        self.dirty.join(&written);
        self.digests.harvested(&self.dirty);
        Ok(Some(sample))
    }

    /// The number of the latest round, from 1.
    pub(super) fn round_number(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    /// The number of the latest pass, from 1.
    pub(super) fn passes(&self) -> u32 {
        self.passes
    }

    /// The next pass begins a round; those after it continue that round.
    pub(super) fn begin_round(&mut self) {
        self.begins_round = true;
    }

    /// Sends the dirty pages and closes the pass; returns the lanes' measurements. While the guest runs, the
    /// pages are tracked again, the time limit may end the pass, and looks `inside` are taken.
    pub(super) fn send_pass(
        &mut self,
        Migration { options, started, .. }: Migration<'_>,
        connected: &mut Connected,
        (inside, throttle_percent): (Option<LookInside<'_>>, u8),
    ) -> Result<Round, MigrationFailure> {
        let began = Instant::now();
        let is_running = inside.is_some();
        if is_running {
            self.leave_waiting_out(connected)?;
        }
        self.passes += 1;
        let skips_zeros = self.passes == 1 && self.initially == InitiallyDirty::All;
        let pass = Pass { number: self.passes, skips_zeros };
        let (looks, progress, dirty_pages) =
            (Looks::since(began), PassProgress::default(), self.dirty.count());
        let Connected { link, log, .. } = connected;
        let log = &**log;
        let check = || {
            options.cancel.check()?;
            let Some(inside) = inside else { return Ok(()) };
            options.limits.check_time(started)?;
            let Some(lasted) = looks.due() else { return Ok(()) };
            let cleared = progress.cleared_pages();
            let uncleared = dirty_pages.saturating_sub(cleared);
            let left = lasted.mul_f64(uncleared as f64 / cleared.max(1) as f64);
            let look = |pages| Inside {
                lasted,
                sent_bytes: progress.sent_bytes(),
                written_bytes: pages * PAGE_BYTES,
                left,
            };
            inside(log.peek(uncleared)?.map(look))
        };
        let gate =
            SendGate { pace: options.limits.pace(), check: &check, progress: inside.and(Some(&progress)) };
        let log = is_running.then_some(log);
        let sent = link.send_pass(pass, (&self.dirty, &self.stripes), log, gate)?;
        self.zero += sent.zero_pages;
        self.first_page = self.first_page.or(sent.first_page);
        let mut round = Round { lanes: sent.lanes, duration: began.elapsed(), ..Round::default() };
        let waited = link.transport.waited();
        round.overhead = round.duration.saturating_sub(round.busy() + waited);
        self.report(&round, sent.pages, throttle_percent);
        Ok(round)
    }

    /// Adds a pass to the report of its round.
    fn report(&mut self, pass: &Round, pages: u64, throttle_percent: u8) {
        if std::mem::take(&mut self.begins_round) || self.rounds.is_empty() {
            self.rounds.push(RoundReport::default());
        }
        let Some(report) = self.rounds.last_mut() else { return };
        report.pages += pages;
        report.bytes += pages * PAGE_BYTES;
        report.ms += ms(pass.duration);
        report.throttle_percent = throttle_percent;
        report.lanes.resize(pass.lanes.len(), LaneReport::default());
        for (sum, lane) in report.lanes.iter_mut().zip(&pass.lanes) {
            sum.bytes += lane.bytes;
            sum.busy_ms += ms(lane.busy);
        }
        let busiest_ms = report.lanes.iter().map(|lane| lane.busy_ms).fold(0.0, f64::max);
        let sent_bytes = report.lanes.iter().map(|lane| lane.bytes).sum();
        report.bandwidth_mbps = mbps(sent_bytes, Duration::from_secs_f64(busiest_ms / 1e3));
    }
}

/// What is dirty after a harvest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Harvest {
    /// Pages that the log had.
    pub(super) found_pages: u64,
    /// Pages that are dirty.
    pub(super) dirty_pages: u64,
    /// Pages among them that waited.
    pub(super) waiting_pages: u64,
    /// Pages among those that were not written again.
    pub(super) unwritten_pages: u64,
}

impl Harvest {
    /// Whether pages are dirty that do not wait.
    pub(super) fn has_more_than_waiting(&self) -> bool {
        self.dirty_pages > self.waiting_pages
    }
}

/// A round with one more pass.
pub(super) fn joined(round: &Round, pass: Round) -> Round {
    if round.lanes.is_empty() {
        return pass;
    }
    let lanes = round.lanes.iter().zip(&pass.lanes);
    let lanes = lanes.map(|(sum, lane)| LaneLoad {
        bytes: sum.bytes + lane.bytes,
        busy: sum.busy + lane.busy,
        fence: lane.fence,
    });
    // What a pass costs besides sending, each switch pays once.
    Round { lanes: lanes.collect(), duration: round.duration + pass.duration, ..pass }
}

//! Step 5: the guest belongs to the destination. The source waits for its first heartbeat and makes the
//! report.

use std::time::{Duration, Instant};

use super::migration::{Connected, Migration, let_go};
use super::pages::Pages;
use super::steering::Steering;
use crate::convergence::{Downtime, Lost};
use crate::panics::{Panicked, caught};
use crate::progress::{Event, Report, RoundReport, mbps, ms};
use crate::session::Link;
use crate::wire::Message;

/// A guest that runs at the destination.
pub(super) struct Switched<'migration> {
    pub(super) migration: Migration<'migration>,
    pub(super) connected: Connected,
    pub(super) pages: Pages,
    pub(super) steering: Steering,
    pub(super) heartbeats_per_second: Option<f64>,
    pub(super) measured: Measured,
}

/// The durations of the steps.
pub(super) struct Measured {
    /// From the call to the first round.
    pub(super) setup: Duration,
    /// How long no host ran the guest.
    pub(super) downtime: Duration,
    /// The same by parts.
    pub(super) parts: Downtime,
    /// How many pages the destination compared.
    pub(super) compared_pages: u64,
    /// When the guest last beat at the source, counted back from the moment GO was sent.
    pub(super) last_beat_before_go: Option<(u64, Duration)>,
    pub(super) go_sent: Option<Instant>,
}

impl Switched<'_> {
    /// Waits for the guest's first heartbeat at the destination, and reports.
    pub(super) fn complete(mut self) -> Report {
        let total = self.migration.started.elapsed();
        let (link, measured) = (&mut self.connected.link, &self.measured);
        self.migration.observer.event(&Event::Switched { downtime_ms: ms(measured.downtime) });
        let guest_downtime = caught(|| guest_downtime(link, measured)).unwrap_or_else(|Panicked(text)| {
            tracing::error!("the guest has moved, and its own downtime is not known: {text}");
            None
        });
        let report = self.report(total, guest_downtime);
        let Connected { link, log, .. } = self.connected;
        let_go((link, log));
        report
    }

    fn report(&self, total: Duration, guest_downtime: Option<Duration>) -> Report {
        let Self { migration, connected, pages, steering, measured, .. } = self;
        let (link, verify) = (&connected.link, migration.options.verify);
        let (blocks_hashed_paused, blocks_hashed_running) = pages.blocks_hashed(verify);
        let sum = |of: fn(&RoundReport) -> u64| pages.rounds.iter().map(of).sum();
        let (bytes_sent, pages_sent): (u64, u64) = (sum(|round| round.bytes), sum(|round| round.pages));
        let lost = Lost {
            downtime: measured.downtime,
            throttling: steering.throttling.lost(),
            tracking: steering.tracking.unwrap_or_default(),
        };
        let sending_ms: f64 = pages.rounds.iter().map(|round| round.ms).sum();
        Report {
            transport: link.scheme.clone(),
            fell_back: link.fell_back.as_ref().map(|fell_back| fell_back.why.clone()),
            total_ms: ms(total),
            setup_ms: ms(measured.setup),
            first_byte_ms: pages.first_page.map(|first_page| ms(first_page - migration.started)),
            downtime_ms: ms(measured.downtime),
            verify_ms: ms(measured.parts.verify),
            guest_downtime_ms: guest_downtime.map(ms),
            lost_ms: ms(lost.total()),
            lost_to_throttling_ms: ms(lost.throttling),
            lost_to_tracking_ms: steering.tracking.map(ms),
            predicted: steering.predicted.known().map(|_| steering.predicted.into()),
            measured: measured.parts.into(),
            heartbeats_per_second: self.heartbeats_per_second,
            limits: steering.limits.clone(),
            rounds: pages.rounds.clone(),
            bytes_sent,
            pages_sent,
            pages_zero: pages.zero,
            throughput_mbps: mbps(bytes_sent, Duration::from_secs_f64(sending_ms / 1e3)),
            verify,
            verified_pages: measured.compared_pages,
            blocks_hashed_running,
            blocks_hashed_paused,
        }
    }
}

/// From the guest's last heartbeat at the source to its first at the destination.
fn guest_downtime(link: &mut Link, measured: &Measured) -> Option<Duration> {
    let (count, age) = measured.last_beat_before_go?;
    match link.control.receive("the guest's heartbeat", Some(ALIVE_MAX)) {
        Ok(Message::Alive(attempt_id, there, after_go_us))
            if attempt_id == link.attempt_id && there > count =>
        {
            // Before it arrived, whatever the destination sends.
            let after_go = Duration::from_micros(after_go_us).min(measured.go_sent?.elapsed());
            Some(age + after_go)
        }
        _ => None,
    }
}

/// How long to wait for the destination's report of the guest's first heartbeat.
const ALIVE_MAX: Duration = Duration::from_secs(5);

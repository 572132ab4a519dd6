//! The basis of the decisions between rounds: their history, the limits, and the predicted downtime.

use std::mem;
use std::time::Duration;

use super::error::MigrationFailure;
use super::migration::{Connected, Migration};
use super::pages::Pages;
use super::quota::{self, QuotaMeter, WriteLimit};
use super::throttle::{Slowing, Throttle, ThrottleMeter, throttle};
use crate::convergence::{Convergence, Decision, Diverging, Downtime, History, Inside, Limits, Lost, Why};
use crate::panics::caught;
use crate::progress::{Event, RoundReport, ms};
use crate::session::Link;

/// The knowledge after the latest round.
pub(super) struct Steering {
    /// The history of the rounds while the guest ran.
    pub(super) history: History,
    /// The limits of the last decision.
    pub(super) limits: Limits,
    /// The latest prediction of the downtime.
    pub(super) predicted: Downtime,
    /// Heartbeats of the guest per second before the first round, if it sends enough to measure.
    heartbeats_per_second: Option<f64>,
    /// What throttling has taken from the guest.
    pub(super) throttling: ThrottleMeter,
    /// What slows the guest now, if anything does.
    throttle: Option<Throttle>,
    /// What each vCPU writes.
    quota: QuotaMeter,
    /// By how much the guest was slowed over time, and in this round.
    slowing: Slowing,
    /// The latest look inside this pass.
    inside: Option<Inside>,
    /// The part that was reported with the rounds so far.
    throttling_reported: Duration,
    /// What recording its writes has taken from the guest, if its heartbeat shows that.
    pub(super) tracking: Option<Duration>,
    /// Whether the operator was warned that the migration will not converge.
    warned: bool,
    /// Whether the operator was warned that no switch keeps the limit.
    warned_of_limit: bool,
}

impl Steering {
    pub(super) fn new(link: &Link, limits: Limits, heartbeats_per_second: Option<f64>) -> Self {
        Self {
            history: History::new(link.control.round_trip()),
            limits,
            predicted: Downtime::default(),
            heartbeats_per_second,
            throttling: ThrottleMeter::default(),
            throttle: None,
            quota: QuotaMeter::default(),
            slowing: Slowing::default(),
            inside: None,
            throttling_reported: Duration::ZERO,
            tracking: None,
            warned: false,
            warned_of_limit: false,
        }
    }

    /// A new attempt over other lanes starts without knowledge.
    pub(super) fn begin_anew(&mut self, link: &Link) {
        self.history = History::new(link.control.round_trip());
        (self.warned, self.warned_of_limit) = (false, false);
    }

    /// Takes over the operator's changes since the last round; returns whether any were made.
    pub(super) fn take_limits(&mut self, migration: Migration<'_>) -> bool {
        let limits = migration.options.limits.limits();
        if limits == self.limits {
            return false;
        }
        self.history.limits_changed(limits.bandwidth_max != self.limits.bandwidth_max);
        migration.observer.event(&Event::LimitsChanged(limits.clone()));
        self.limits = limits;
        if self.history.throttle_percent() > self.limits.throttle_max_percent {
            self.throttle(migration, self.limits.throttle_max_percent);
        }
        true
    }

    /// Predicts the downtime of a switch now, with this duration of comparing.
    pub(super) fn predict(
        &mut self,
        migration: Migration<'_>,
        connected: &Connected,
        (pages, verify): (&Pages, Duration),
    ) {
        let handover = connected.link.handover_cost(&pages.dirty, connected.handover.record_time());
        let (cost, limit) = (&migration.options.switch_cost, migration.options.limits.pace().now());
        let without = Downtime::predicted(&self.history, cost, &handover, limit);
        self.predicted = Downtime { verify, ..without.unwrap_or_default() };
    }

    /// The input of the decision.
    pub(super) fn convergence(&self, migration: Migration<'_>) -> Convergence<'_> {
        // More rounds do not reduce the remaining comparison, so the limit applies to the rest.
        let predicted = Downtime { verify: Duration::ZERO, ..self.predicted };
        let (limits, history) = (&self.limits, &self.history);
        Convergence { limits, history, predicted, elapsed: migration.started.elapsed() }
    }

    /// Records whether the round brought the switch nearer, and warns the operator if the migration seems not
    /// to converge.
    pub(super) fn judge(&mut self, migration: Migration<'_>) {
        let diverging = self.convergence(migration).diverging();
        self.history.judged(diverging.map(|diverging| diverging.why));
        if let Some(diverging) = diverging {
            self.warn(migration, &diverging);
        }
    }

    /// Warns the operator once.
    fn warn(&mut self, migration: Migration<'_>, diverging: &Diverging) {
        let limit_too_low = diverging.why == Why::LimitTooLow;
        let warned = if limit_too_low { &mut self.warned_of_limit } else { &mut self.warned };
        if mem::replace(warned, true) {
            return;
        }
        migration.observer.event(&Event::NotConverging {
            why: diverging.to_string(),
            help: diverging.help.to_string(),
            dirty_rate_mbps: diverging.dirty_rate / 1e6,
            bandwidth_mbps: diverging.bandwidth.map(|bandwidth| bandwidth / 1e6),
        });
    }

    /// A round begins.
    pub(super) fn begins_round(&mut self) {
        self.history.begins_round();
        self.slowing.begins_round();
    }

    /// A pass of a round begins.
    pub(super) fn begins_pass(&mut self) {
        self.inside = None;
    }

    /// By how many percent the guest was slowed in this round.
    pub(super) fn mean_throttle(&self) -> u8 {
        self.slowing.mean_percent()
    }

    /// A look inside a pass that takes long: limits may have changed, and the guest may be too fast.
    pub(super) fn look_inside(
        &mut self,
        migration: Migration<'_>,
        now: Option<Inside>,
    ) -> Result<(), MigrationFailure> {
        let same_limits = !self.take_limits(migration);
        let looks = mem::replace(&mut self.inside, now).zip(now);
        let Some((before, now)) = looks.filter(|_| same_limits) else { return Ok(()) };
        let convergence = self.convergence(migration);
        let Some(diverging) = convergence.diverging_inside(&before, &now) else { return Ok(()) };
        let decision = convergence.decide_inside(&before, &now);
        self.warn(migration, &diverging);
        match decision {
            // Before a round has shown how writes are spread, a quota is unknown, and better than a share of
            // the time.
            Decision::Throttle(percent) if self.can_throttle(migration, percent) => {
                self.throttle(migration, percent);
            }
            Decision::GiveUp => {
                let rounds = u32::try_from(self.history.rounds().len()).unwrap_or(u32::MAX);
                return Err(not_converging(&diverging, rounds.saturating_add(1)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether it is known how to slow the guest by so many percent.
    fn can_throttle(&self, migration: Migration<'_>, percent: u8) -> bool {
        let has_quota = caught(|| migration.guest.write_quota().is_some()).unwrap_or(false);
        !has_quota || self.quota.has_failed || self.write_limit(migration, percent).is_some()
    }

    /// Adds the guest's heartbeats during the last round, and the time that it lost, to history and report.
    pub(super) fn count_lost(&mut self, heartbeats_per_second: Option<f64>, report: &mut RoundReport) {
        let lost = self.throttling.lost();
        report.lost_to_throttling_ms = ms(lost.saturating_sub(self.throttling_reported));
        self.throttling_reported = lost;
        let write_limit = self.write_limit_in_force();
        report.write_limit_mbps = write_limit.map(|limit| limit.mbps());
        // The quota may have taken more or less from the vCPU that beats than from others.
        let beats = self.heartbeats_per_second.zip(heartbeats_per_second).filter(|_| write_limit.is_none());
        let round = self
            .history
            .rounds()
            .last()
            .map(|round| (round.duration + round.harvest, round.throttle_percent));
        let tracking =
            beats.zip(round).map(|(beats, (time, percent))| Lost::to_tracking(time, beats, percent));
        self.history.tracked(tracking);
        report.heartbeats_per_second = heartbeats_per_second;
        report.lost_to_tracking_ms = tracking.map(ms);
        self.tracking = tracking.map(|lost| lost + self.tracking.unwrap_or_default()).or(self.tracking);
    }

    /// Reports the course that was chosen, with the figures of the others.
    pub(super) fn report_course(&self, migration: Migration<'_>, decision: Decision) {
        if !self.limits.if_stuck.is_auto() {
            return;
        }
        let offers = self.convergence(migration).offers();
        let (taken, not_taken): (Vec<_>, Vec<_>) = offers.iter().partition(|offer| offer.step == decision);
        migration.observer.event(&Event::CourseChosen {
            taken: taken.first().map(ToString::to_string),
            not_taken: not_taken.into_iter().map(ToString::to_string).collect(),
        });
    }

    pub(super) fn throttle(&mut self, migration: Migration<'_>, percent: u8) {
        let expected_bytes = self.convergence(migration).expected_bytes(percent);
        let writes = self.write_limit(migration, percent);
        let Some(now) = throttle(migration, percent, writes) else {
            self.history.throttle_refused();
            return;
        };
        if writes.is_some() && now == Throttle::Time {
            self.quota.has_failed = true;
            self.history.writes_are_spread(None);
        }
        self.count_stood(migration);
        self.throttle = (percent > 0).then_some(now);
        self.history.throttled(percent, expected_bytes);
        self.slowing.set(percent);
        let share = match now {
            Throttle::Time => f64::from(percent) / 100.0,
            Throttle::Writes(_) if self.quota.measures_time() => 0.0,
            Throttle::Writes(_) => self.history.throttled_share(),
        };
        self.throttling.set(share);
    }

    /// Adjusts a limit of the guest's writes to the next round, which is shorter than the last one: so the
    /// guest is not slowed by more than was decided.
    pub(super) fn renew_limit(&mut self, migration: Migration<'_>) {
        if self.write_limit_in_force().is_none() {
            return;
        }
        let Some(limit) = self.write_limit(migration, self.history.throttle_percent()) else { return };
        match quota::limit(migration.guest, Some(limit)) {
            Ok(()) => self.throttle = Some(Throttle::Writes(limit)),
            Err(why) => tracing::warn!("the limit of the guest's writes stays as it is: {why}"),
        }
    }

    /// Counts what each vCPU wrote in the last round, and what a quota took from it.
    pub(super) fn count_writes(&mut self, migration: Migration<'_>) {
        let Some(reading) = self.quota.read(migration.guest) else { return };
        match self.throttle {
            None => {
                if let Some(shares) = self.quota.spread(&reading) {
                    self.history.writes_are_spread(Some(shares));
                }
            }
            Some(Throttle::Time) => {}
            Some(Throttle::Writes(_)) => {
                let Some(lost) = reading.lost() else { return };
                self.throttling.measured(lost);
                if let Some(percent) = self.quota.slowed_percent(&reading) {
                    self.history.slowed(percent, lost);
                }
            }
        }
    }

    /// The guest is about to be paused: from then on it loses all of its time.
    pub(super) fn stands_still(&mut self, migration: Migration<'_>) {
        self.count_stood(migration);
        self.throttling.set(0.0);
    }

    /// Counts what a quota took since the last round.
    fn count_stood(&mut self, migration: Migration<'_>) {
        let reading = self.quota.read(migration.guest);
        if let (Some(reading), Some(Throttle::Writes(_))) = (reading, self.throttle) {
            self.throttling.measured(reading.lost().unwrap_or_default());
        }
    }

    /// The limit of the guest's writes in place of slowing it by so many percent, if vCPUs can be limited.
    fn write_limit(&self, migration: Migration<'_>, percent: u8) -> Option<WriteLimit> {
        let shares = self.history.write_shares().filter(|_| percent > 0 && !self.quota.has_failed)?;
        let of_all = f64::from(100 - percent.min(99)) / 100.0;
        let bytes_per_second = self.convergence(migration).write_limit(percent)?;
        Some(WriteLimit::of(bytes_per_second, of_all, shares))
    }

    fn write_limit_in_force(&self) -> Option<WriteLimit> {
        match self.throttle {
            Some(Throttle::Writes(limit)) => Some(limit),
            Some(Throttle::Time) | None => None,
        }
    }

    /// Why the migration gives up after this many rounds.
    pub(super) fn not_converging(&self, migration: Migration<'_>, rounds: u32) -> MigrationFailure {
        not_converging(&self.convergence(migration).given_up(), rounds)
    }
}

fn not_converging(diverging: &Diverging, rounds: u32) -> MigrationFailure {
    MigrationFailure::NotConverging {
        why: diverging.to_string(),
        help: diverging.help.to_string(),
        dirty_rate_mbps: diverging.dirty_rate / 1e6,
        throughput_mbps: diverging.bandwidth.map(|bandwidth| bandwidth / 1e6),
        rounds,
        predicted_downtime_ms: diverging.predicted.map(ms),
    }
}

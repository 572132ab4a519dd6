//! The basis of the decisions between rounds: their history, the limits, and the predicted downtime.

use std::mem;
use std::time::Duration;

use super::error::MigrationFailure;
use super::migration::{Connected, Migration};
use super::pages::Pages;
use super::throttle::{ThrottleMeter, throttle};
use crate::convergence::{Convergence, Decision, Downtime, History, Limits, Lost, Why};
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
        let (cost, bandwidth_max) = (&migration.options.switch_cost, self.limits.bandwidth_max);
        let without = Downtime::predicted(&self.history, cost, &handover, bandwidth_max);
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
        let Some(diverging) = diverging else { return };
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

    /// Adds the guest's heartbeats during the last round, and the time that it lost, to history and report.
    pub(super) fn count_lost(&mut self, heartbeats_per_second: Option<f64>, report: &mut RoundReport) {
        let lost = self.throttling.lost();
        report.lost_to_throttling_ms = ms(lost.saturating_sub(self.throttling_reported));
        self.throttling_reported = lost;
        let beats = self.heartbeats_per_second.zip(heartbeats_per_second);
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
        if throttle(migration, percent) {
            self.throttling.set(percent);
            self.history.throttled(percent, expected_bytes);
        } else {
            self.history.throttle_refused();
        }
    }

    /// Why the migration gives up after this many rounds.
    pub(super) fn not_converging(&self, migration: Migration<'_>, rounds: u32) -> MigrationFailure {
        let diverging = self.convergence(migration).given_up();
        MigrationFailure::NotConverging {
            why: diverging.to_string(),
            help: diverging.help.to_string(),
            dirty_rate_mbps: diverging.dirty_rate / 1e6,
            throughput_mbps: diverging.bandwidth.map(|bandwidth| bandwidth / 1e6),
            rounds,
            predicted_downtime_ms: diverging.predicted.map(ms),
        }
    }
}

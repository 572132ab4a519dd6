//! Steps 2 and 3: all of RAM, then what was written meanwhile, until the rest fits the downtime.

use std::mem;
use std::time::{Duration, Instant};

use super::{Attempt, MigrationFailure};
use crate::convergence::{Convergence, Decision, Downtime, LaneLoad, Round, Why};
use crate::memory::PAGE_BYTES;
use crate::panics::{Panicked, caught};
use crate::progress::{Event, LaneReport, LimitsReport, RoundReport, mbps, ms};
use crate::session::{HeartbeatAt, SendGate};

impl Attempt<'_> {
    /// Steps 2 and 3: sends what is dirty until the rest fits the downtime, all of RAM to begin with.
    pub(super) fn converge(&mut self) -> Result<(), MigrationFailure> {
        loop {
            let (began, beat) = (Instant::now(), HeartbeatAt::now(self.guest));
            // Within the time of the round, as what is written meanwhile is in its harvest.
            self.hash_if_due()?;
            let mut round = self.send_round(true)?;
            // Before a harvest: what the guest writes while it is made is seen by that, and no prediction misses it.
            if self.saving.is_none() {
                self.saving = Some(self.ready_to_save()?);
            }
            let harvesting = Instant::now();
            round.dirty_pages = self.dirty.by(&self.link.pool, |dirty| {
                dirty.clear();
                dirty.harvest(&*self.log)
            })?;
            self.source_digests.harvested(&self.dirty);
            round.harvest = harvesting.elapsed();
            self.check_ram()?;
            round.duration = harvesting - began;
            self.history.push(round);
            let same_limits = !self.take_limits();
            self.predicted = self.predict();
            self.tell_round(beat.rate_until(HeartbeatAt::now(self.guest)));
            // What was done under other limits says nothing of these.
            if same_limits {
                self.judge();
            }
            match self.convergence().decide() {
                Decision::AnotherRound => {}
                Decision::Throttle(percent) => self.throttle(percent),
                Decision::Relax(downtime) => {
                    self.history.relaxed_to(downtime);
                    self.observer.event(&Event::Relaxed { downtime_limit_ms: ms(downtime) });
                    if self.convergence().fits() && !self.wants_to_hash() {
                        return Ok(());
                    }
                }
                Decision::Switch | Decision::Stop if self.wants_to_hash() => {}
                Decision::Switch => return Ok(()),
                Decision::Stop => {
                    let predicted_downtime_ms = self.predicted.known().map(ms);
                    self.observer.event(&Event::Stopping { predicted_downtime_ms });
                    return Ok(());
                }
                Decision::GiveUp => return Err(self.not_converging()),
            }
        }
    }

    /// Sends what is dirty and closes the round; returns what the lanes did. `running` says whether the guest does: then the
    /// time may run out on the way.
    pub(super) fn send_round(&mut self, running: bool) -> Result<Round, MigrationFailure> {
        let began = Instant::now();
        let number = self.round_number() + 1;
        let what = (&self.dirty, &self.stripes);
        let (options, started) = (self.options, self.started);
        let check = || {
            options.cancel.check()?;
            if running { options.limits.check_time(started) } else { Ok(()) }
        };
        let gate = SendGate { pace: options.limits.pace(), check: &check };
        let log = running.then_some(&*self.log);
        let sent = self.link.send_round(number, what, log, gate)?;
        self.pages_zero += sent.zero_pages;
        self.first_page = self.first_page.or(sent.first_page);
        let round = Round { lanes: sent.lanes, duration: began.elapsed(), ..Round::default() };
        let lane = |lane: &LaneLoad| LaneReport { bytes: lane.bytes, busy_ms: ms(lane.busy) };
        self.rounds.push(RoundReport {
            pages: sent.pages,
            bytes: sent.pages * PAGE_BYTES,
            ms: ms(round.duration),
            bandwidth_mbps: mbps(round.sent_bytes(), round.busy()),
            throttle_percent: self.history.throttle_percent(),
            lanes: round.lanes.iter().map(lane).collect(),
            ..RoundReport::default()
        });
        Ok(round)
    }

    /// Takes over what the operator has changed since the last round; returns whether that was anything.
    fn take_limits(&mut self) -> bool {
        let limits = self.options.limits.limits();
        if limits == self.limits {
            return false;
        }
        self.history.limits_changed(limits.bandwidth_max != self.limits.bandwidth_max);
        self.observer.event(&Event::LimitsChanged(LimitsReport::from(&limits)));
        self.limits = limits;
        if self.history.throttle_percent() > self.limits.throttle_max_percent {
            self.throttle(self.limits.throttle_max_percent);
        }
        true
    }

    fn predict(&self) -> Downtime {
        let handover = self.link.handover_cost(&self.dirty, self.handover.record_time());
        let (cost, bandwidth_max) = (&self.options.switch_cost, self.limits.bandwidth_max);
        let without = Downtime::predicted(&self.history, cost, &handover, bandwidth_max);
        Downtime { verify: self.verify_expected(), ..without.unwrap_or_default() }
    }

    fn convergence(&self) -> Convergence<'_> {
        // More rounds do not make what is left to compare less, so the limit is held against the rest.
        let predicted = Downtime { verify: Duration::ZERO, ..self.predicted };
        let (limits, history) = (&self.limits, &self.history);
        Convergence { limits, history, predicted, elapsed: self.started.elapsed() }
    }

    /// Notes whether the round brought the switch nearer, and tells the operator when it looks as if nothing will.
    fn judge(&mut self) {
        let diverging = self.convergence().diverging();
        self.history.judged(diverging.map(|diverging| diverging.why));
        let Some(diverging) = diverging else { return };
        let limit_too_low = diverging.why == Why::LimitTooLow;
        let warned = if limit_too_low { &mut self.warned_of_limit } else { &mut self.warned };
        if mem::replace(warned, true) {
            return;
        }
        self.observer.event(&Event::NotConverging {
            why: diverging.to_string(),
            help: diverging.help.to_string(),
            dirty_rate_mbps: diverging.dirty_rate / 1e6,
            bandwidth_mbps: diverging.bandwidth.map(|bandwidth| bandwidth / 1e6),
        });
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        let why = match caught(|| self.guest.throttle(percent)) {
            Ok(Ok(())) => {
                self.history.throttled(percent);
                self.observer.event(&Event::Throttled { percent });
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(Panicked(text)) => format!("the VMM panicked: {text}"),
        };
        self.history.throttle_refused();
        tracing::warn!("the guest cannot be throttled to {percent} %: {why}");
    }

    /// Tells of the round that was sent last, and harvested if the guest runs.
    pub(super) fn tell_round(&mut self, heartbeats_per_second: Option<f64>) {
        let number = self.round_number();
        let Some(report) = self.rounds.last_mut() else { return };
        if let Some(round) = self.history.rounds().last().filter(|_| !self.paused) {
            report.dirty_rate_mbps = round.dirty_rate() / 1e6;
            report.harvest_ms = ms(round.harvest);
            report.heartbeats_per_second = heartbeats_per_second;
        }
        let predicted_downtime_ms = self.predicted.known().map(ms);
        self.observer.event(&Event::Round { number, round: report.clone(), predicted_downtime_ms });
    }

    pub(super) fn round_number(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    fn not_converging(&self) -> MigrationFailure {
        let diverging = self.convergence().given_up();
        MigrationFailure::NotConverging {
            why: diverging.to_string(),
            help: diverging.help.to_string(),
            dirty_rate_mbps: diverging.dirty_rate / 1e6,
            throughput_mbps: diverging.bandwidth.map(|bandwidth| bandwidth / 1e6),
            rounds: self.round_number(),
            predicted_downtime_ms: diverging.predicted.map(ms),
        }
    }
}

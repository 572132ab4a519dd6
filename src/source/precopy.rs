//! Steps 2 and 3: all of RAM, then the guest's writes meanwhile, until the rest fits the downtime.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::error::{MigrationError, MigrationFailure};
use super::give_up::Undo;
use super::migration::{Connected, Migration};
use super::pages::{Harvest, Pages, joined};
use super::prepare::Prepared;
use super::saving;
use super::steering::Steering;
use super::switch::Converged;
use crate::convergence::{Decision, Round};
use crate::dirty::{CaughtUp, InitiallyDirty};
use crate::panics::caught_or;
use crate::poison::IgnorePoison;
use crate::progress::{Event, ms};
use crate::saved_state::StateSender;
use crate::session::{HeartbeatAt, SessionError};

/// The rounds while the guest runs.
pub(super) struct Precopy<'migration> {
    pub(super) migration: Migration<'migration>,
    pub(super) connected: Connected,
    pub(super) pages: Pages,
    pub(super) steering: Steering,
    /// Whether to hash blocks before the next round.
    pub(super) hash_next: bool,
    /// The sender of the saved state, once it is made.
    saving: Option<StateSender>,
    /// When the last lane of the latest round ended.
    sent: Option<Instant>,
    /// Since when the guest is paused, if its VMM has paused it by itself.
    pub(super) paused_since: Option<Instant>,
}

impl<'migration> Prepared<'migration> {
    /// Sends rounds until the rest fits the downtime. After a failure the guest runs on at full speed.
    pub(super) fn precopy(self) -> Result<Converged<'migration>, MigrationError> {
        let Self { migration, connected, heartbeats_per_second } = self;
        let mut precopy = Precopy {
            pages: Pages::new(&connected.link, migration.options.verify),
            steering: Steering::new(
                &connected.link,
                migration.options.limits.limits(),
                heartbeats_per_second,
            ),
            hash_next: false,
            saving: None,
            sent: None,
            paused_since: None,
            migration,
            connected,
        };
        let ended = caught_or(|| precopy.run());
        let Precopy { migration, connected, pages, steering, paused_since, .. } = precopy;
        match ended {
            Ok((setup, saving)) => Ok(Converged {
                migration,
                connected,
                pages,
                saving,
                steering,
                setup,
                paused_since,
                heartbeats_per_second,
            }),
            Err(cause) => {
                let throttle_percent = steering.history.throttle_percent();
                // A VMM that names pages may have paused the guest by itself, unseen yet.
                let undo = Undo { throttle_percent, may_be_paused: pages.are_named() };
                Err(connected.give_up(migration, undo, cause))
            }
        }
    }
}

impl Precopy<'_> {
    /// Returns the duration of the set-up, and the sender of the saved state.
    fn run(&mut self) -> Result<(Duration, StateSender), MigrationFailure> {
        let initially = self.connected.log.start()?;
        self.pages.begin(initially, &self.connected.link);
        if initially == InitiallyDirty::All {
            // All pages are dirty already; this measures the duration of a harvest.
            let harvesting = Instant::now();
            self.pages.harvest(&self.connected)?;
            self.steering.history.harvested(harvesting.elapsed());
        }
        let setup = self.migration.started.elapsed();
        self.converge_over_any_lanes()?;
        let saving = self.saving.take();
        Ok((setup, saving.map_or_else(|| self.ready_to_save(), Ok)?))
    }

    /// Sends the dirty pages until the rest fits the downtime, all of RAM to begin with.
    pub(super) fn converge(&mut self) -> Result<(), MigrationFailure> {
        let migration = self.migration;
        loop {
            let beat = HeartbeatAt::now(migration.guest);
            self.round()?;
            self.steering.count_writes(migration);
            let same_limits = !self.steering.take_limits(migration);
            let verify = self.verify_expected();
            self.steering.predict(migration, &self.connected, (&self.pages, verify));
            self.choose_waiting();
            self.report_round(beat.rate_until(HeartbeatAt::now(migration.guest)));
            if self.paused_since.is_some() {
                return Ok(());
            }
            // Warnings under other limits do not apply to these.
            if same_limits {
                self.steering.judge(migration);
            }
            let decision = self.decide()?;
            match decision {
                Decision::AnotherRound | Decision::Look(_) => self.steering.renew_limit(migration),
                Decision::Throttle(percent) => {
                    self.steering.throttle(migration, percent);
                    self.pages.none_wait();
                    self.steering.history.waits(0);
                }
                Decision::Relax(downtime) => {
                    self.steering.history.relaxed_to(downtime);
                    migration.observer.event(&Event::Relaxed { downtime_limit_ms: ms(downtime) });
                    if self.steering.convergence(migration).fits() && !self.wants_to_hash() {
                        return Ok(());
                    }
                }
                Decision::Switch | Decision::Stop if self.wants_to_hash() => {}
                Decision::Switch => return Ok(()),
                Decision::Stop => {
                    let predicted_downtime_ms = self.steering.predicted.known().map(ms);
                    migration.observer.event(&Event::Stopping { predicted_downtime_ms });
                    return Ok(());
                }
                Decision::GiveUp => {
                    return Err(self.steering.not_converging(migration, self.pages.round_number()));
                }
            }
        }
    }

    /// Decides what comes next, watching the guest as long as that tells more.
    fn decide(&mut self) -> Result<Decision, MigrationFailure> {
        loop {
            let decision = self.steering.convergence(self.migration).decide();
            match decision {
                Decision::Look(time) => self.look(time)?,
                Decision::Throttle(_) | Decision::Relax(_) | Decision::GiveUp => {
                    self.steering.report_course(self.migration, decision);
                    return Ok(decision);
                }
                _ => return Ok(decision),
            }
        }
    }

    /// Watches for so long what the guest writes.
    fn look(&mut self, time: Duration) -> Result<(), MigrationFailure> {
        self.migration.options.cancel.check()?;
        match self.pages.look(&self.connected, time)? {
            Some(sample) => self.steering.history.looked(sample),
            None => self.steering.history.cannot_look(),
        }
        Ok(())
    }

    /// One round and the harvest after it.
    fn round(&mut self) -> Result<(), MigrationFailure> {
        let began = Instant::now();
        // The time after the first round includes the preparation of the sender of the state.
        if let Some(sent) = self.sent.filter(|_| self.steering.history.rounds().len() > 1) {
            self.steering.history.began_after(began - sent);
        }
        // Within the time of the round, because its harvest includes the writes meanwhile.
        self.hash_if_due()?;
        self.pages.begin_round();
        self.steering.begins_round();
        let (passes_began, mut round, mut named_pages) = (Instant::now(), Round::default(), 0);
        let harvesting = loop {
            self.send_pass_of(&mut round)?;
            // Before a harvest: it then includes the guest's writes during the preparation, and no prediction
            // misses them.
            if self.saving.is_none() {
                self.saving = Some(self.ready_to_save()?);
            }
            let mut harvesting = Instant::now();
            let (mut harvest, caught_up) = self.catch_up(&mut named_pages)?;
            // Pages that were named before the VMM looked anew: a guest that writes some over and over has
            // written many of them again, so they would count twice.
            if matches!(caught_up, CaughtUp::Fully { unnamed_pages: 1.. }) && harvest.has_more_than_waiting()
            {
                self.send_pass_of(&mut round)?;
                harvesting = Instant::now();
                harvest = self.pages.harvest_anew(&self.connected)?;
                named_pages += harvest.found_pages;
            }
            round.dirty_pages = harvest.dirty_pages;
            round.waited_pages = harvest.waiting_pages;
            round.unwritten_pages = harvest.unwritten_pages;
            match caught_up {
                CaughtUp::Partly => {}
                CaughtUp::Fully { unnamed_pages } => {
                    // Waiting pages that were named are found written again, and are counted already.
                    let counted = unnamed_pages.min(self.pages.waiting_written_again());
                    // Those named since are among them.
                    let unwaiting_pages = harvest.dirty_pages.saturating_sub(harvest.waiting_pages);
                    round.dirty_pages = harvest.waiting_pages + unwaiting_pages.max(unnamed_pages - counted);
                    break harvesting;
                }
                CaughtUp::Paused { since } => {
                    self.paused_since = Some(since);
                    break harvesting;
                }
            }
        };
        round.harvest = harvesting.elapsed();
        if let Some(why) = self.connected.log.warning() {
            self.migration.observer.event(&Event::LogWarning { why });
        }
        self.connected.check_ram(self.migration)?;
        round.duration = harvesting - began;
        if self.pages.are_named() {
            // The overhead of a single pass is predicted by itself.
            let sending = round.busy() + round.overhead;
            let naming = (harvesting - passes_began).saturating_sub(sending);
            (round.named_pages, round.naming) = (named_pages, naming);
        }
        round.throttle_percent = self.steering.mean_throttle();
        self.steering.history.push(round);
        Ok(())
    }

    /// Sends the dirty pages as a part of this round.
    fn send_pass_of(&mut self, round: &mut Round) -> Result<(), MigrationFailure> {
        let (migration, percent) = (self.migration, self.steering.history.throttle_percent());
        self.steering.begins_pass();
        let (steering, failure) = (Mutex::new(&mut self.steering), Mutex::new(None));
        let inside = |look| {
            steering.lock().ignore_poison().look_inside(migration, look).map_err(|why| {
                *failure.lock().ignore_poison() = Some(why);
                SessionError::Cancelled
            })
        };
        let sent = self.pages.send_pass(migration, &mut self.connected, (Some(&inside), percent));
        if let Some(why) = failure.into_inner().ignore_poison() {
            return Err(why);
        }
        *round = joined(round, sent?);
        round.late = migration.options.limits.pace().late();
        self.sent = Some(Instant::now());
        Ok(())
    }

    /// Harvests as soon as the log has all or some of the guest's writes.
    fn catch_up(&mut self, named_pages: &mut u64) -> Result<(Harvest, CaughtUp), MigrationFailure> {
        let Migration { options, started, .. } = self.migration;
        loop {
            let caught_up = self.connected.log.catch_up()?;
            let harvest = self.pages.harvest_anew(&self.connected)?;
            *named_pages += harvest.found_pages;
            if harvest.has_more_than_waiting() || caught_up != CaughtUp::Partly {
                return Ok((harvest, caught_up));
            }
            options.cancel.check()?;
            options.limits.check_time(started)?;
            self.connected.link.control.liveness().check()?;
        }
    }

    /// Chooses which dirty pages are left for the last round.
    fn choose_waiting(&mut self) {
        let most = self.steering.convergence(self.migration).waiting_max();
        let Some(round) = self.steering.history.rounds().last() else { return };
        let time = round.duration + round.harvest;
        let rewritten = self.pages.choose_waiting(&self.connected, time, most);
        self.steering.history.rewrote(rewritten);
        self.steering.history.waits(self.pages.waiting_pages());
    }

    /// Reports the latest round.
    fn report_round(&mut self, heartbeats_per_second: Option<f64>) {
        let number = self.pages.round_number();
        let Some(report) = self.pages.rounds.last_mut() else { return };
        if let Some(round) = self.steering.history.rounds().last() {
            report.dirty_rate_mbps = round.dirty_rate() / 1e6;
            report.harvest_ms = ms(round.harvest);
        }
        self.steering.count_lost(heartbeats_per_second, report);
        let predicted_downtime_ms = self.steering.predicted.known().map(ms);
        let round = report.clone();
        self.migration.observer.event(&Event::Round { number, round, predicted_downtime_ms });
    }

    fn ready_to_save(&self) -> Result<StateSender, MigrationFailure> {
        saving::ready(&self.connected.link, self.migration.options)
    }
}

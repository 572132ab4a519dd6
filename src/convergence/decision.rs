mod inside;

use std::time::Duration;

use super::auto;
use super::course::Offer;
use super::diverging::{Diverging, Help, Why};
use super::history::History;
use super::limits::{Limits, Policy};
use super::next::Decision;
use super::outlook::{Bounds, Outlook};
use super::prediction::{Downtime, SAFETY};
use super::round::Round;
use super::writes::Writes;
use crate::memory::PAGE_BYTES;

pub use inside::Inside;

/// A round must leave at most this share of what the round before left, else the guest is too fast. Below 1,
/// because measurements of short rounds vary by some percent.
const SHRINK_MAX: f64 = 0.97;

/// The same where the guest writes a hot set in each round, whose size such measurements show less well.
const SHRINK_MAX_HOT: f64 = 0.8;

/// A guest that writes this share of its pages in each round writes a hot set.
const HOT_SHARE: f64 = 0.85;

/// The time for naming pages is worth a word if it is more than this share of the time for sending them.
const NAMING_COUNTS: f64 = 0.1;

/// Advice has this much to spare.
const ADVICE_MARGIN: f64 = 1.1;

/// Advice brings a switch within so many rounds.
const ROUNDS_ADVISED: usize = 40;

/// The share of a guest's time that recording its writes takes, where no heartbeat shows it.
const TRACKING_ASSUMED: f64 = 0.005;

/// The share of what may be left for the switch that may be hot pages.
const WAITING_SHARE: f64 = 0.8;

/// A throttle aims to bring a guest down to this share of the bandwidth, and covers half of the distance in
/// one step ...
const THROTTLE_AIM: f64 = 0.7;
/// ... or these percent at least and at most.
const THROTTLE_STEP_PERCENT: std::ops::RangeInclusive<f64> = 10.0..=20.0;

/// The state of a migration after a round.
#[derive(Clone, Copy, Debug)]
pub struct Convergence<'migration> {
    /// What the operator asked for.
    pub limits: &'migration Limits,
    /// Its rounds.
    pub history: &'migration History,
    /// The downtime of a switch now.
    pub predicted: Downtime,
    /// Time since the migration began.
    pub elapsed: Duration,
}

impl Convergence<'_> {
    /// The downtime allowed now.
    #[must_use]
    pub fn allowed(&self) -> Duration {
        self.history.relaxed().unwrap_or_default().max(self.limits.downtime)
    }

    /// Whether a switch would meet the limits.
    #[must_use]
    pub fn fits(&self) -> bool {
        safe(self.predicted.total()) <= self.allowed() && self.may_lose(self.predicted.total())
    }

    /// Whether the prediction rests on more than the first round, in which both ends prepare memory. If not,
    /// another round is cheap: it takes no longer than the switch would, with the guest running, leaves less
    /// to send, and measures what a round takes besides sending.
    fn is_sure(&self) -> bool {
        self.history.rounds().len() > 1
    }

    /// Decides what comes next.
    #[must_use]
    pub fn decide(&self) -> Decision {
        match self.decide_as_known() {
            // A look may show what would help.
            Decision::GiveUp => auto::next_look(self.history).map_or(Decision::GiveUp, Decision::Look),
            decision => decision,
        }
    }

    fn decide_as_known(&self) -> Decision {
        let is_auto = self.limits.if_stuck.is_auto();
        if self.fits() {
            let waits = !self.is_sure()
                || is_auto && self.ahead().is_some_and(|ahead| auto::waits(&ahead, self.history));
            return if waits && !self.is_over() { Decision::AnotherRound } else { Decision::Switch };
        }
        if self.is_over() {
            return self.last_word();
        }
        if !self.may_lose(self.fixed()) {
            return Decision::GiveUp;
        }
        if is_auto { self.decide_by_loss() } else { self.decide_by_chain() }
    }

    /// How many bytes of hot pages may wait for the last round, and how many bytes a second the link carries.
    ///
    /// With these alone left, a switch meets the limits with something to spare. More would keep a migration
    /// from its end, because none of them is sent before. While the guest is slowed, none waits: whether the
    /// throttle has an effect shows in what is written again.
    #[must_use]
    pub fn waiting_max(&self) -> (f64, f64) {
        let bandwidth = self.bandwidth().unwrap_or(0.0);
        if self.history.throttle_percent() > 0 {
            return (0.0, bandwidth);
        }
        let left = |most: Duration| most.saturating_sub(self.history.lost().total() + self.fixed());
        let may_lose = self.limits.lost_max.map_or(f64::INFINITY, |most| left(most).as_secs_f64());
        let most = self.sending_seconds().min(may_lose).max(0.0) * self.page_rate().unwrap_or(0.0);
        (WAITING_SHARE * most, bandwidth)
    }

    /// The courses that are weighed against each other, and what each costs; empty before that is known.
    #[must_use]
    pub fn offers(&self) -> Vec<Offer> {
        self.ahead().map_or_else(Vec::new, |ahead| auto::offers(&ahead))
    }

    /// What a round would leave dirty with the guest slowed by so many percent, in bytes.
    #[must_use]
    pub fn expected_bytes(&self, throttle_percent: u8) -> f64 {
        self.ahead().map_or(f64::INFINITY, |ahead| self.likely(&ahead).expected_bytes(throttle_percent))
    }

    /// The bytes a second to which the guest's writes are to be limited in the next round in place of slowing
    /// it by so many percent, if that is known.
    #[must_use]
    pub fn write_limit(&self, throttle_percent: u8) -> Option<f64> {
        Some(self.ahead()?.write_limit(throttle_percent))
    }

    fn decide_by_loss(&self) -> Decision {
        let is_slowed = self.history.throttle_percent() > 0;
        let patience = if is_slowed { Duration::ZERO } else { auto::patience(self.history) };
        let is_stuck = self.stuck_long_enough() && self.stuck_for() >= patience;
        let acts = is_stuck && self.diverging().is_some() || is_slowed || self.is_late();
        match self.ahead().filter(|_| acts) {
            Some(ahead) => match auto::next_look(self.history) {
                Some(look) => Decision::Look(look),
                None => match auto::choose(&ahead, self.history) {
                    // Nothing is sure to help, and what is likely may be tried.
                    Decision::GiveUp => auto::experiment(&self.likely(&ahead), self.history),
                    decision => decision,
                },
            },
            None => Decision::AnotherRound,
        }
    }

    fn decide_by_chain(&self) -> Decision {
        if self.history.futile_throttle().is_some() {
            return Decision::Throttle(0);
        }
        let Some(diverging) = self.diverging().filter(|_| self.stuck_long_enough()) else {
            return Decision::AnotherRound;
        };
        for policy in self.limits.if_stuck.policies() {
            match policy {
                Policy::Throttle if diverging.why == Why::LimitTooLow => {}
                Policy::Throttle => {
                    if let Some(throttle) = self.next_throttle() {
                        return throttle;
                    }
                }
                Policy::Relax => {
                    if let Some(downtime) = self.next_relaxed(diverging.why) {
                        return Decision::Relax(downtime);
                    }
                }
                Policy::Stop if self.history.stuck_rounds >= 2 => return self.stop(),
                Policy::Abort if self.history.stuck_rounds >= 2 => return Decision::GiveUp,
                Policy::Stop | Policy::Abort | Policy::Auto => {}
            }
        }
        // No number of rounds makes a switch cheaper than one with nothing left to send.
        if diverging.why == Why::LimitTooLow && self.history.stuck_rounds >= 2 {
            return Decision::GiveUp;
        }
        Decision::AnotherRound
    }

    /// How long the rounds since the last measure took that did not bring the switch nearer.
    fn stuck_for(&self) -> Duration {
        let stuck = usize::try_from(self.history.stuck_rounds).unwrap_or(usize::MAX);
        let rounds = self.history.rounds().iter().rev().take(stuck);
        rounds.map(|round| round.duration + round.harvest).sum()
    }

    /// A single round may have been disturbed. After a measure was taken, one suffices.
    fn stuck_long_enough(&self) -> bool {
        let acted = self.history.throttle_percent() > 0 || self.history.relaxed().is_some();
        self.history.stuck_rounds >= if acted { 1 } else { 2 }
    }

    /// Whether the guest may be paused for so long after all that it has lost.
    fn may_lose(&self, downtime: Duration) -> bool {
        let lost = self.history.lost().total();
        self.limits.lost_max.is_none_or(|most| lost.saturating_add(downtime) <= most)
    }

    fn stop(&self) -> Decision {
        if self.may_lose(self.predicted.total()) { Decision::Stop } else { Decision::GiveUp }
    }

    /// The same ahead, of a guest that does what is likely, although it has not so far.
    fn likely(&self, ahead: &Outlook) -> Outlook {
        let writes = Writes::of(self.history).unwrap_or_else(|| ahead.writes.clone());
        Outlook { writes, is_stuck: true, ..ahead.clone() }
    }

    /// What is ahead, once a round has shown it.
    fn ahead(&self) -> Option<Outlook> {
        let (writes, bandwidth) = (Writes::of(self.history)?, self.bandwidth()?);
        let overhead = self.history.overhead() + self.history.between_rounds();
        let left = |most: Option<Duration>, used: Duration| {
            most.map_or(f64::INFINITY, |most| most.saturating_sub(used).as_secs_f64())
        };
        let futile = [self.history.futile(), self.history.futile_throttle()];
        let futile_percent =
            futile.into_iter().flatten().map(|futile| futile.throttle_percent).max().unwrap_or(0);
        // Rounds at full speed did not do what is likely.
        let is_stuck = self.history.stuck_rounds >= 2 && self.history.throttle_percent() == 0;
        let is_shown = !self.history.looks().is_empty() || self.history.rewritten_share().is_some();
        Some(Outlook {
            writes: if is_stuck && is_shown { writes.cautious() } else { writes },
            bandwidth,
            dirty_bytes: self.dirty_bytes(),
            waiting_bytes: self.waiting_bytes(),
            written_in: self
                .history
                .rounds()
                .last()
                .map_or(0.0, |round| (round.duration + round.harvest).as_secs_f64()),
            downtime: self.predicted.total().as_secs_f64(),
            fixed: self.fixed().as_secs_f64(),
            naming: self.naming(),
            overhead: overhead.as_secs_f64(),
            tracking_share: self.history.tracking_share().unwrap_or(TRACKING_ASSUMED),
            throttle_percent: self.history.throttle_percent(),
            write_shares: self.history.write_shares().cloned(),
            is_stuck: is_stuck && self.history.stuck_rounds >= 3 || self.is_late(),
            bounds: Bounds {
                downtime: self.allowed().as_secs_f64(),
                downtime_max: self.limits.downtime_relaxed_max().as_secs_f64(),
                throttle_max_percent: if self.history.throttle_refused {
                    0
                } else {
                    self.limits.throttle_max_percent
                },
                futile_percent,
                rounds: self.rounds_left(),
                seconds: left(self.limits.timeout, self.elapsed),
                lost: left(self.limits.lost_max, self.history.lost().total()),
            },
        })
    }

    /// Why the migration will not come to a switch within the limits, if that is to be expected. A limit that
    /// is too low shows after the first round, every other reason after the second.
    #[must_use]
    pub fn diverging(&self) -> Option<Diverging> {
        if self.fits() || self.history.rounds().is_empty() {
            return None;
        }
        let seconds_for_pages = self.sending_seconds();
        if seconds_for_pages <= 0.0 {
            return Some(self.stuck_because(Why::LimitTooLow));
        }
        if !self.may_lose(self.fixed()) {
            return Some(self.stuck_because(Why::LostTooMuch));
        }
        let shrink = self.history.shrink()?;
        let target_bytes = seconds_for_pages * self.page_rate()?;
        if shrink > SHRINK_MAX || shrink > SHRINK_MAX_HOT && self.hot_bytes() > target_bytes {
            return Some(self.stuck_because(Why::GuestTooFast));
        }
        // More rounds make only the rest smaller.
        let waiting = Some(self.waiting_bytes()).filter(|&waiting| waiting < target_bytes).unwrap_or(0.0);
        let target_bytes = target_bytes - waiting;
        let (dirty_bytes, rate) = (self.dirty_bytes() - waiting, self.page_rate()?);
        let rounds = (target_bytes / dirty_bytes).ln() / shrink.ln();
        let seconds = (dirty_bytes - target_bytes) / (rate * (1.0 - shrink));
        let seconds_left =
            self.limits.timeout.map(|timeout| timeout.saturating_sub(self.elapsed).as_secs_f64());
        let too_slow =
            rounds > f64::from(self.rounds_left()) || seconds_left.is_some_and(|left| seconds > left);
        too_slow.then(|| self.stuck_because(Why::TooSlow))
    }

    /// Why the migration is given up: the reason of [`diverging`](Self::diverging), or that a limit of rounds
    /// or time is reached.
    #[must_use]
    pub fn given_up(&self) -> Diverging {
        self.diverging().unwrap_or_else(|| self.stuck_because(Why::TooSlow))
    }

    /// Whether no further round is allowed.
    fn is_over(&self) -> bool {
        self.rounds_left() == 0 || self.limits.timeout.is_some_and(|timeout| self.elapsed >= timeout)
    }

    /// Whether so many rounds are over that no more of them are waited for if a switch is possible.
    fn is_late(&self) -> bool {
        self.limits.rounds_max >= 10 && self.rounds_left() <= self.limits.rounds_max / 4
    }

    fn rounds_left(&self) -> u32 {
        let rounds = u32::try_from(self.history.rounds().len()).unwrap_or(u32::MAX);
        self.limits.rounds_max.saturating_sub(rounds)
    }

    /// The decision when no further round is allowed.
    fn last_word(&self) -> Decision {
        let chain = &self.limits.if_stuck;
        let needed = safe(self.predicted.total());
        let relaxes = chain.is_auto() || chain.policies().contains(&Policy::Relax);
        if relaxes && needed <= self.limits.downtime_relaxed_max() && self.may_lose(self.predicted.total()) {
            return Decision::Relax(needed);
        }
        if chain.ends_with_stop() { self.stop() } else { Decision::GiveUp }
    }

    /// As far as is known to be enough; otherwise a step further, until that is known or no step is left.
    fn next_throttle(&self) -> Option<Decision> {
        let (now, max) = (self.history.throttle_percent(), self.limits.throttle_max_percent);
        let ahead = self.ahead().filter(|_| now < max && !self.history.throttle_refused)?;
        if let Some(look) = auto::next_look(self.history) {
            return Some(Decision::Look(look));
        }
        let is_shown = !ahead.writes.is_saturated() && !self.history.looks().is_empty();
        let mut more = ahead.throttles().filter(|&percent| percent > now);
        if is_shown {
            let enough = more.find(|&percent| ahead.best(percent, 1, ahead.bounds.downtime).is_some());
            // What was not enough is not raised by little. If nothing is predicted to be enough and no other
            // policy is left, the most is tried.
            let is_last = self.limits.if_stuck.policies().last() == Some(&Policy::Throttle);
            let most = is_last.then_some(max).filter(|_| ahead.throttles().any(|percent| percent > now));
            let raised = enough.map(|percent| if now == 0 { percent } else { percent.max(now + 10) });
            return raised.or(most).map(|percent| Decision::Throttle(percent.min(max)));
        }
        let least = more.next()?;
        let step = (self.throttle_for(THROTTLE_AIM)? - f64::from(now)) / 2.0;
        let step = step.clamp(*THROTTLE_STEP_PERCENT.start(), *THROTTLE_STEP_PERCENT.end());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 20")]
        let percent = now.saturating_add(step.round() as u8).min(max);
        let in_vain = least > now.saturating_add(5);
        Some(Decision::Throttle(if in_vain { percent.max(least) } else { percent }))
    }

    /// Half as much again as now, if the limits allow it. If the limit is too low: half as much again as the
    /// least cost of a switch, but no more than a switch would cost now.
    fn next_relaxed(&self, why: Why) -> Option<Duration> {
        let (now, max) = (self.allowed(), self.limits.downtime_relaxed_max());
        let more = |than: Duration| (than * 3 / 2).max(than + Duration::from_millis(1)).min(max);
        let next = if why == Why::LimitTooLow {
            let least = safe(self.fixed());
            let next = more(least.max(now)).min(safe(self.predicted.total()));
            (least <= max).then_some(next)
        } else {
            Some(more(now))
        };
        next.filter(|&next| next > now)
    }

    /// The downtime of a switch with nothing left to send.
    fn fixed(&self) -> Duration {
        self.predicted.without_pages(self.history).total()
    }

    /// Bytes a second that can be sent now, if known: as measured in the rounds, capped by the limit.
    fn bandwidth(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let most = self.limits.bandwidth_max.map_or(f64::INFINITY, |most| most.get() as f64);
        self.history.bandwidth().map(|bandwidth| bandwidth.min(most))
    }

    /// How long sending waits until a VMM that names pages has named a byte more, in seconds.
    fn naming(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let page_bytes = PAGE_BYTES as f64;
        self.history.naming_seconds() / page_bytes
    }

    /// Bytes of pages a second that can be named, if the VMM names them, and sent.
    fn page_rate(&self) -> Option<f64> {
        let bandwidth = self.bandwidth()?;
        Some(bandwidth / (1.0 + bandwidth * self.naming()))
    }

    /// By how many percent the guest would have to be slowed to write this share of the bandwidth.
    fn throttle_for(&self, share: f64) -> Option<f64> {
        Some(100.0 * (1.0 - share * self.page_rate()? / self.history.dirty_rate_unthrottled().max(1.0)))
    }

    /// How long sending may take for a switch to meet the limit; not above 0 if no time is left.
    fn sending_seconds(&self) -> f64 {
        self.allowed().as_secs_f64() / SAFETY - self.fixed().as_secs_f64()
    }

    /// Whether the bandwidth limit, and not the link, caps the bandwidth.
    fn is_limited(&self, bandwidth: f64) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        self.limits.bandwidth_max.is_some_and(|most| bandwidth > 0.9 * most.get() as f64)
    }

    fn dirty_bytes(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        self.history.rounds().last().map_or(0.0, |round| round.dirty_bytes() as f64)
    }

    /// Bytes of the pages that the guest writes in each round, if these are nearly all that it writes and no
    /// look can show how fast.
    fn hot_bytes(&self) -> f64 {
        let share = self.history.rewritten_share().filter(|&share| share >= HOT_SHARE).unwrap_or(0.0);
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let bytes = self.history.rounds().last().map_or(0.0, |round| round.written_bytes() as f64);
        share * bytes
    }

    fn waiting_bytes(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let bytes_of = |round: &Round| (round.waiting_pages * PAGE_BYTES) as f64;
        self.history.rounds().last().map_or(0.0, bytes_of)
    }

    fn stuck_because(&self, why: Why) -> Diverging {
        let in_round = self.history.rounds().last().map_or(0.0, Round::dirty_rate);
        // The next attempt has all rounds and all the time.
        let (rounds, timeout) = (self.limits.rounds_max, self.limits.timeout);
        let seconds = timeout.map_or(f64::INFINITY, |timeout| timeout.as_secs_f64());
        let ahead = self.ahead().map(|ahead| Outlook {
            writes: ahead.writes.cautious(),
            bounds: Bounds { rounds, seconds, throttle_max_percent: 99, ..ahead.bounds },
            ..ahead
        });
        let rate = ahead.as_ref().map_or(0.0, |ahead| ahead.writes.rate());
        Diverging {
            why,
            // A look shows more than a round, in which most pages may be written again and again.
            dirty_rate: if self.history.looks().is_empty() { in_round } else { in_round.max(rate) },
            is_saturated: ahead.as_ref().is_some_and(|ahead| ahead.writes.is_saturated()),
            bandwidth: self.page_rate(),
            is_named: self.naming() * self.bandwidth().unwrap_or(0.0) > NAMING_COUNTS,
            predicted: self.predicted.known(),
            fixed: self.fixed(),
            tried: self.history.futile_throttle().or(self.history.futile()),
            help: self.help(why, ahead.as_ref()),
        }
    }

    /// Changes that would help, each with something to spare, because the next attempt measures anew.
    fn help(&self, why: Why, ahead: Option<&Outlook>) -> Help {
        let spared = |downtime: Duration| safe(downtime).mul_f64(ADVICE_MARGIN);
        let bandwidth = self.bandwidth();
        let limited = bandwidth.is_some_and(|bandwidth| self.is_limited(bandwidth));
        let downtime = match ahead {
            // What more rounds leave at the least.
            Some(ahead) => {
                let least = ahead.ends(0).into_iter().map(|end| end.lost.downtime).min();
                least.map(|least| {
                    spared(if why == Why::GuestTooFast { self.predicted.total() } else { least })
                })
            }
            None => self.predicted.known().map(spared),
        };
        let lost = (why == Why::LostTooMuch)
            .then(|| self.history.lost().total().saturating_add(spared(self.predicted.total())));
        let only = matches!(why, Why::LimitTooLow | Why::LostTooMuch);
        let Some(ahead) = ahead.filter(|_| !only) else {
            return Help { downtime, bandwidth: None, limited, throttle_percent: None, lost };
        };
        let converges = |ahead: &Outlook, percent: u8| {
            let ends = ahead.ends(percent).into_iter().take(ROUNDS_ADVISED);
            let aim = ahead.bounds.downtime / ADVICE_MARGIN;
            ends.skip(1)
                .any(|end| end.needed() <= aim && end.until_switch.as_secs_f64() <= ahead.bounds.seconds)
        };
        let faster = (1..=80).map(|step| ahead.bandwidth * 1.1f64.powi(step));
        let bandwidth = faster.into_iter().find(|&faster| converges(&ahead.over(faster), 0));
        let now = self.history.throttle_percent();
        // A hot set of unknown speed cannot be slowed by a known percentage.
        let slower = ahead.throttles().filter(|&percent| percent > now && !ahead.writes.is_saturated());
        Help {
            downtime,
            bandwidth: bandwidth.map(|bandwidth| bandwidth * ADVICE_MARGIN),
            limited,
            throttle_percent: slower.into_iter().find(|&percent| converges(ahead, percent)),
            lost,
        }
    }
}

/// A prediction with its safety margin, to be compared with a limit.
fn safe(predicted: Duration) -> Duration {
    predicted.mul_f64(SAFETY)
}

#[cfg(test)]
mod tests;

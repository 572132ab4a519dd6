use std::time::Duration;

use super::diverging::{Diverging, Help, Why};
use super::history::{History, Round};
use super::limits::{Limits, Policy};
use super::prediction::{Downtime, SAFETY};

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the dirty pages in another round.
    AnotherRound,
    /// Slow the guest to this many percent, then send another round.
    Throttle(u8),
    /// Allow this much downtime; if the switch fits it now, switch.
    Relax(Duration),
    /// Pause the guest and switch: the downtime limit is met.
    Switch,
    /// Pause the guest and switch, whatever the downtime.
    Stop,
    /// Give up; the guest runs on.
    GiveUp,
}

/// A round must leave at most this share of what the round before left, else the guest is too fast. Below 1,
/// because measurements of short rounds vary by some percent.
const SHRINK_MAX: f64 = 0.97;

/// The share of the bandwidth at which a slowed guest, or a faster link, surely converges.
const SHRINK_AIM: f64 = 0.85;

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

    /// Whether a switch would meet the limit.
    #[must_use]
    pub fn fits(&self) -> bool {
        safe(self.predicted.total()) <= self.allowed()
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
        if self.fits() && (self.is_sure() || self.is_over()) {
            return Decision::Switch;
        }
        if self.fits() {
            return Decision::AnotherRound;
        }
        if self.is_over() {
            return self.last_word();
        }
        let acted = self.history.throttle_percent() > 0 || self.history.relaxed().is_some();
        // A single round may have been disturbed. After a measure was taken, one suffices.
        let stuck_long_enough = self.history.stuck_rounds >= if acted { 1 } else { 2 };
        let Some(diverging) = self.diverging().filter(|_| stuck_long_enough) else {
            return Decision::AnotherRound;
        };
        for policy in self.limits.if_stuck.policies() {
            match policy {
                Policy::Throttle => {
                    let percent = self.next_throttle().filter(|_| diverging.why != Why::LimitTooLow);
                    if let Some(percent) = percent {
                        return Decision::Throttle(percent);
                    }
                }
                Policy::Relax => {
                    if let Some(downtime) = self.next_relaxed(diverging.why) {
                        return Decision::Relax(downtime);
                    }
                }
                Policy::Stop if self.history.stuck_rounds >= 2 => return Decision::Stop,
                Policy::Abort if self.history.stuck_rounds >= 2 => return Decision::GiveUp,
                Policy::Stop | Policy::Abort => {}
            }
        }
        // No number of rounds makes a switch cheaper than one with nothing left to send.
        if diverging.why == Why::LimitTooLow && self.history.stuck_rounds >= 2 {
            return Decision::GiveUp;
        }
        Decision::AnotherRound
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
        let shrink = self.history.shrink()?;
        let target_bytes = seconds_for_pages * self.bandwidth()?;
        if shrink > SHRINK_MAX {
            return Some(self.stuck_because(Why::GuestTooFast));
        }
        let (dirty_bytes, bandwidth) = (self.dirty_bytes(), self.bandwidth()?);
        let rounds = (target_bytes / dirty_bytes).ln() / shrink.ln();
        let seconds = (dirty_bytes - target_bytes) / (bandwidth * (1.0 - shrink));
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

    fn rounds_left(&self) -> u32 {
        let rounds = u32::try_from(self.history.rounds().len()).unwrap_or(u32::MAX);
        self.limits.rounds_max.saturating_sub(rounds)
    }

    /// The decision when no further round is allowed.
    fn last_word(&self) -> Decision {
        let policies = self.limits.if_stuck.policies();
        let needed = safe(self.predicted.total());
        if policies.contains(&Policy::Relax) && needed <= self.limits.downtime_relaxed_max() {
            return Decision::Relax(needed);
        }
        if self.limits.if_stuck.ends_with_stop() { Decision::Stop } else { Decision::GiveUp }
    }

    fn next_throttle(&self) -> Option<u8> {
        let (now, max) = (self.history.throttle_percent(), self.limits.throttle_max_percent);
        if now >= max || self.history.throttle_refused {
            return None;
        }
        let wanted = self.throttle_for(THROTTLE_AIM)?;
        let step = (wanted - f64::from(now)) / 2.0;
        let step = step.clamp(*THROTTLE_STEP_PERCENT.start(), *THROTTLE_STEP_PERCENT.end());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 20")]
        Some(now.saturating_add(step.round() as u8).min(max))
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

    /// By how many percent the guest would have to be slowed to write this share of the bandwidth.
    fn throttle_for(&self, share: f64) -> Option<f64> {
        Some(100.0 * (1.0 - share * self.bandwidth()? / self.history.dirty_rate_unthrottled().max(1.0)))
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

    fn stuck_because(&self, why: Why) -> Diverging {
        let dirty_rate = self.history.rounds().last().map_or(0.0, Round::dirty_rate);
        let bandwidth = self.bandwidth();
        let fixed = self.fixed();
        let help = if why == Why::LimitTooLow {
            Help { downtime: Some(safe(fixed)), bandwidth: None, limited: false, throttle_percent: None }
        } else {
            let faster = (dirty_rate / SHRINK_AIM).min(self.dirty_bytes() / self.sending_seconds().max(1e-3));
            let throttle =
                self.throttle_for(SHRINK_AIM).map(f64::ceil).filter(|percent| (1.0..=99.0).contains(percent));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 99")]
            Help {
                downtime: self.predicted.known().map(safe),
                bandwidth: bandwidth.and_then(|bandwidth| Some(faster).filter(|&faster| faster > bandwidth)),
                limited: bandwidth.is_some_and(|bandwidth| self.is_limited(bandwidth)),
                throttle_percent: throttle
                    .map(|percent| percent as u8)
                    .filter(|&percent| percent > self.history.throttle_percent()),
            }
        };
        Diverging { why, dirty_rate, bandwidth, predicted: self.predicted.known(), fixed, help }
    }
}

/// A prediction with its safety margin, to be compared with a limit.
fn safe(predicted: Duration) -> Duration {
    predicted.mul_f64(SAFETY)
}

#[cfg(test)]
mod tests {
    use super::super::history::tests::{round, round_in};
    use super::super::prediction::{HandoverCost, SwitchCost};
    use super::*;

    const COST: SwitchCost = SwitchCost {
        pause: Duration::ZERO,
        save: Duration::ZERO,
        state_bytes: 0,
        load: Duration::from_millis(10),
        start: Duration::ZERO,
    };

    /// A migration with made-up rounds.
    struct Made {
        limits: Limits,
        history: History,
        elapsed: Duration,
    }

    impl Made {
        fn new(downtime_ms: u64, if_stuck: &str) -> Self {
            let limits = Limits {
                downtime: Duration::from_millis(downtime_ms),
                if_stuck: if_stuck.parse().unwrap(),
                ..Limits::default()
            };
            Self { limits, history: History::default(), elapsed: Duration::ZERO }
        }

        fn convergence(&self) -> Convergence<'_> {
            let predicted =
                Downtime::predicted(&self.history, &COST, &HandoverCost::default(), None).unwrap();
            Convergence { limits: &self.limits, history: &self.history, predicted, elapsed: self.elapsed }
        }

        fn after(&mut self, round: Round) -> Decision {
            self.history.push(round);
            let diverging = self.convergence().diverging();
            self.history.judged(diverging.map(|diverging| diverging.why));
            let decision = self.convergence().decide();
            match decision {
                Decision::Throttle(percent) => self.history.throttled(percent),
                Decision::Relax(downtime) => self.history.relaxed_to(downtime),
                _ => {}
            }
            decision
        }

        /// Rounds of a guest that writes as fast as pages are sent, until the decision is other than another
        /// round.
        fn decisions_of_a_guest_too_fast(&mut self, rounds: usize) -> Vec<Decision> {
            (0..rounds).map(|_| self.after(round(1000, 1000))).collect()
        }
    }

    #[test]
    fn it_switches_as_soon_as_the_rest_fits_the_limit_with_some_to_spare() {
        // 1 MiB a millisecond, and 10 ms in addition: (250 + 10) · 1.15 = 299 ms.
        for (left, decision) in [(251, Decision::AnotherRound), (250, Decision::Switch)] {
            let mut made = Made::new(300, "throttle");
            assert_eq!(made.after(round(1000, 900)), Decision::AnotherRound);
            assert_eq!(made.after(round(900, left)), decision);
        }
    }

    #[test]
    fn it_switches_after_the_first_round_only_if_no_other_is_allowed() {
        for left in [250, 1, 0] {
            let mut first = Made::new(300, "throttle");
            assert_eq!(
                first.after(round(1000, left)),
                Decision::AnotherRound,
                "how fast that goes is not sure"
            );
            assert_eq!(first.after(round(left, left)), Decision::Switch);
        }
        let mut only = Made::new(300, "throttle");
        only.limits.rounds_max = 1;
        assert_eq!(only.after(round(1000, 250)), Decision::Switch);
    }

    #[test]
    fn rounds_that_get_smaller_are_left_alone() {
        for share in [50, 70, 85, 93] {
            let mut made = Made::new(50, "throttle,abort");
            let (mut sent, mut rounds) = (10_000, 0);
            loop {
                let dirty = sent * share / 100;
                rounds += 1;
                match made.after(round(sent, dirty)) {
                    Decision::AnotherRound => sent = dirty,
                    Decision::Switch => break,
                    other => panic!("{other:?} in round {rounds} at {share} %"),
                }
            }
            assert!(rounds < 100);
        }
    }

    #[test]
    fn after_two_rounds_it_is_known_that_the_guest_is_too_fast_and_what_would_help() {
        let mut made = Made::new(50, "abort");
        made.after(round(1000, 1000));
        assert_eq!(made.convergence().diverging(), None);
        made.after(round(1000, 990));
        let diverging = made.convergence().diverging().unwrap();
        assert_eq!(diverging.why, Why::GuestTooFast);
        assert_eq!(diverging.help.downtime, Some(Duration::from_millis(1150)));
        assert_eq!(diverging.help.throttle_percent, Some(15));
        let text = format!("{diverging}; it would take {}", diverging.help);
        for part in
            ["1038 MB/s of new pages", "1049 MB/s can be sent", "near 1000 ms", "limit of 1150 ms", "by 15 %"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn one_round_that_was_disturbed_changes_nothing() {
        let mut made = Made::new(50, "throttle,abort");
        for (sent, dirty) in [(10_000, 5000), (5000, 2500), (2500, 3500), (3500, 1200), (1200, 600)] {
            assert_eq!(made.after(round(sent, dirty)), Decision::AnotherRound, "{sent} {dirty}");
        }
    }

    #[test]
    fn throttling_comes_in_small_steps_up_to_its_limit_and_then_the_next_policy_does() {
        let mut made = Made::new(50, "throttle,abort");
        made.limits.throttle_max_percent = 40;
        let decisions = made.decisions_of_a_guest_too_fast(12);
        assert_eq!(decisions[..2], [Decision::AnotherRound; 2], "it is made sure of first");
        let mut last = 0;
        let mut rest = decisions[2..].iter().peekable();
        while let Some(Decision::Throttle(percent)) = rest.next_if(|it| matches!(it, Decision::Throttle(_))) {
            assert!((last + 10..=last + 20).contains(percent) || *percent == 40, "{decisions:?}");
            last = *percent;
        }
        assert_eq!(last, 40);
        assert_eq!(rest.next(), Some(&Decision::AnotherRound));
        assert_eq!(rest.next(), Some(&Decision::GiveUp));
    }

    #[test]
    fn a_guest_that_cannot_be_slowed_further_is_not_waited_for() {
        let mut made = Made::new(50, "throttle,stop");
        made.decisions_of_a_guest_too_fast(2);
        made.history.throttle_refused();
        assert_eq!(made.after(round(1000, 1000)), Decision::Stop);
        let mut never = Made::new(50, "throttle,stop");
        never.limits.throttle_max_percent = 0;
        assert_eq!(never.decisions_of_a_guest_too_fast(3)[2], Decision::Stop);
    }

    #[test]
    fn the_downtime_is_relaxed_step_by_step_up_to_its_maximum() {
        let mut made = Made::new(100, "relax,abort");
        made.limits.downtime_max = Some(Duration::from_millis(300));
        let relaxed = |ms| Decision::Relax(Duration::from_millis(ms));
        let decisions = made.decisions_of_a_guest_too_fast(7);
        let again = Decision::AnotherRound;
        assert_eq!(
            decisions,
            [again, again, relaxed(150), relaxed(225), relaxed(300), again, Decision::GiveUp]
        );
        let mut enough = Made::new(100, "relax,abort");
        let rounds =
            [(1000, 180), (180, 180), (180, 180), (180, 180)].map(|(sent, dirty)| round(sent, dirty));
        let decisions: Vec<_> = rounds.into_iter().map(|round| enough.after(round)).collect();
        assert_eq!(decisions, [again, again, relaxed(150), relaxed(225)]);
        assert!(enough.convergence().fits());
    }

    #[test]
    fn stop_and_abort_wait_for_two_rounds_that_say_the_same() {
        for (policy, decision) in [("stop", Decision::Stop), ("abort", Decision::GiveUp)] {
            let decisions = Made::new(50, policy).decisions_of_a_guest_too_fast(3);
            assert_eq!(decisions, [Decision::AnotherRound, Decision::AnotherRound, decision]);
        }
    }

    #[test]
    fn without_a_last_word_it_goes_on_until_the_rounds_are_over() {
        let mut made = Made::new(50, "throttle");
        made.limits.throttle_max_percent = 0;
        let decisions = made.decisions_of_a_guest_too_fast(100);
        assert!(decisions[..99].iter().all(|&decision| decision == Decision::AnotherRound));
        assert_eq!(decisions[99], Decision::GiveUp);
    }

    #[test]
    fn when_the_time_is_over_the_chain_has_the_last_word() {
        for (chain, last) in [
            ("throttle", Decision::GiveUp),
            ("abort", Decision::GiveUp),
            ("throttle,stop", Decision::Stop),
            ("relax,stop", Decision::Relax(Duration::from_millis(242))),
        ] {
            let mut made = Made::new(50, chain);
            made.limits.timeout = Some(Duration::from_secs(10));
            assert_eq!(made.after(round(1000, 900)), Decision::AnotherRound);
            made.elapsed = Duration::from_secs(10);
            let decision = made.after(round(900, 200));
            match (decision, last) {
                (Decision::Relax(got), Decision::Relax(expected)) => {
                    assert!(got.abs_diff(expected) < Duration::from_millis(1), "{got:?}");
                }
                _ => assert_eq!(decision, last, "{chain}"),
            }
        }
    }

    #[test]
    fn rounds_that_would_get_small_too_late_are_stuck_too() {
        let mut made = Made::new(50, "abort");
        made.limits.timeout = Some(Duration::from_secs(4));
        made.after(round(10_000, 9000));
        made.elapsed = Duration::from_secs(1);
        made.after(round(9000, 8000));
        assert_eq!(made.convergence().diverging().map(|diverging| diverging.why), Some(Why::TooSlow));
        made.limits.timeout = Some(Duration::from_secs(200));
        assert_eq!(made.convergence().diverging(), None);
        made.limits.rounds_max = 20;
        assert_eq!(made.convergence().diverging().map(|diverging| diverging.why), Some(Why::TooSlow));
    }

    #[test]
    fn a_limit_that_no_switch_can_keep_is_told_after_one_round_and_acted_on_after_two() {
        let ms = Duration::from_millis;
        for (chain, max_ms, decision) in [
            ("throttle", 0, Decision::GiveUp),
            ("abort", 0, Decision::GiveUp),
            ("throttle,abort", 0, Decision::GiveUp),
            ("throttle,stop", 0, Decision::Stop),
            // (10 + 1) · 1.15: the cost of a switch now; slowing the guest does not reduce it.
            ("throttle,relax", 50, Decision::Relax(Duration::from_micros(12_650))),
            ("relax,stop", 12, Decision::Relax(ms(12))),
            // Less than any switch costs: allowing that much would be useless.
            ("relax", 11, Decision::GiveUp),
            ("relax,stop", 11, Decision::Stop),
            ("relax,abort", 11, Decision::GiveUp),
        ] {
            let mut made = Made::new(10, chain);
            made.limits.downtime_max = Some(ms(max_ms));
            assert_eq!(made.after(round(100, 10)), Decision::AnotherRound, "{chain}");
            let diverging = made.convergence().diverging().unwrap();
            assert_eq!(diverging.why, Why::LimitTooLow);
            assert_eq!(diverging.help.downtime, Some(Duration::from_micros(11_500)));
            assert_eq!(made.after(round(10, 1)), decision, "{chain}, at most {max_ms} ms");
        }
    }

    #[test]
    fn a_limit_that_is_relaxed_to_what_a_switch_costs_is_relaxed_on_with_much_left_to_send() {
        let mut made = Made::new(1, "relax");
        made.limits.downtime_max = Some(Duration::from_millis(100));
        let decisions: Vec<_> = (0..4).map(|_| made.after(round(1000, 30))).collect();
        let relaxed = |nanos| Decision::Relax(Duration::from_nanos(nanos));
        let again = Decision::AnotherRound;
        assert_eq!(decisions, [again, relaxed(17_250_000), relaxed(25_875_000), relaxed(38_812_500)]);
    }

    #[test]
    fn a_limit_that_is_raised_after_it_was_told_is_honoured() {
        let mut made = Made::new(10, "throttle");
        made.after(round(100, 10));
        assert_eq!(made.convergence().diverging().map(|diverging| diverging.why), Some(Why::LimitTooLow));
        made.limits.downtime = Duration::from_millis(40);
        made.history.limits_changed(false);
        assert_eq!(made.after(round(10, 1)), Decision::Switch);
    }

    #[test]
    fn what_one_round_says_of_the_limit_does_not_count_as_a_guest_that_is_too_fast() {
        let mut made = Made::new(50, "throttle");
        let mut slow = round(1000, 1000);
        slow.harvest = Duration::from_secs(1);
        assert_eq!(made.after(slow), Decision::AnotherRound);
        assert_eq!(made.convergence().diverging().map(|diverging| diverging.why), Some(Why::LimitTooLow));
        assert_eq!(made.after(round(1000, 1000)), Decision::AnotherRound, "once too fast");
        assert!(matches!(made.after(round(1000, 1000)), Decision::Throttle(_)));
    }

    #[test]
    fn before_anything_was_sent_no_figure_is_made_up() {
        let mut made = Made::new(50, "abort");
        made.limits.rounds_max = 2;
        for _ in 0..2 {
            made.after(round_in(0, 1, 10));
            assert_eq!(made.convergence().diverging(), None, "nothing is known");
        }
        let given_up = made.convergence().given_up();
        assert_eq!((given_up.bandwidth, given_up.predicted), (None, None));
        assert!(given_up.fixed < Duration::from_millis(11), "{given_up:?}");
        let text = format!("{given_up}; it would take {}", given_up.help);
        assert!(text.contains("how much can be sent is not known yet"), "{text}");
        assert!(text.contains("more rounds or more time") && !text.contains("slow the guest"), "{text}");

        let mut idle = Made::new(5, "abort");
        idle.after(round_in(0, 1, 0));
        idle.after(round_in(0, 1, 0));
        let diverging = idle.convergence().diverging().unwrap();
        assert_eq!(
            (diverging.why, diverging.help.downtime),
            (Why::LimitTooLow, Some(Duration::from_micros(11_500)))
        );
    }

    #[test]
    fn a_bandwidth_limit_that_was_changed_is_reckoned_with_before_any_round_has_shown_it() {
        let mut made = Made::new(50, "throttle,abort");
        made.decisions_of_a_guest_too_fast(2);
        assert_eq!(made.convergence().diverging().unwrap().bandwidth, Some(1048.576e6));
        made.limits.bandwidth_max = std::num::NonZeroU64::new(100_000_000);
        made.history.limits_changed(true);
        assert_eq!(made.convergence().decide(), Decision::AnotherRound, "what was judged was another link");
        let diverging = made.convergence().diverging().unwrap();
        assert_eq!(diverging.bandwidth, Some(100e6));
        assert!(
            diverging.help.to_string().contains("or a bandwidth limit of 1234 MB/s"),
            "{}",
            diverging.help
        );
    }
}

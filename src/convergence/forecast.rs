use std::time::Duration;

use super::curve::{DirtyCurve, DirtySample};
use super::decision::Convergence;
use super::diverging::{Diverging, Help};
use super::history::History;
use super::limits::Limits;
use super::lost::Lost;
use super::next::Decision;
use super::prediction::{Downtime, HandoverCost, SwitchCost};
use super::round::{LaneLoad, Round};
use crate::memory::PAGE_BYTES;

/// A hypothetical migration.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How much of its RAM the guest ever touched: what the first round sends, and the most that the guest
    /// can write in a round.
    pub touched_bytes: u64,
    /// What the guest writes.
    pub curve: DirtyCurve,
    /// The share of the guest's time that recording its writes takes, if its heartbeat shows that.
    pub tracking_share: Option<f64>,
    /// Bytes a second that the link would carry.
    pub bandwidth: f64,
    /// The link's round trip.
    pub round_trip: Duration,
    /// How long a harvest of the dirty log takes.
    pub harvest: Duration,
    /// The cost of a switch.
    pub cost: SwitchCost,
    /// The other costs of a handover.
    pub handover: HandoverCost,
    /// The limits of the migration.
    pub limits: Limits,
}

/// The predicted course of a migration.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// The rounds while the guest runs.
    pub rounds: Vec<ForecastRound>,
    /// How it would end: with [`Decision::Switch`], [`Decision::Stop`] or [`Decision::GiveUp`].
    pub end: Decision,
    /// How far the guest would have been slowed by then.
    pub throttle_percent: u8,
    /// How much downtime would have been allowed by then.
    pub allowed: Duration,
    /// How long the guest would be paused at the end.
    pub downtime: Downtime,
    /// Total time, including the downtime but not the setup.
    pub total: Duration,
    /// Bytes of pages sent, including the last round.
    pub sent_bytes: u64,
    /// How much of its time the guest would lose.
    pub lost: Lost,
    /// The courses that were weighed against each other at the last choice, in words and with their costs.
    pub courses: Vec<String>,
    /// Why it would not come to a switch without a measure, and what would help, as first reported; `None` if
    /// it would.
    pub diverging: Option<Diverging>,
    /// What would help in the end, if it would be given up.
    pub advice: Option<Help>,
}

/// One predicted round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForecastRound {
    /// Bytes of pages sent.
    pub sent_bytes: u64,
    /// How long that takes.
    pub duration: Duration,
    /// Bytes of pages dirty again at its end.
    pub dirty_bytes: u64,
}

impl Forecast {
    /// Simulates a migration, deciding after each round as a real one does. The model assumes that a guest
    /// slowed by `p` percent writes in a time what it would write in `1 - p` of the time at full speed.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let (mut history, mut rounds) = (History::new(plan.round_trip), Vec::new());
        let (mut elapsed, mut diverging, mut courses) = (Duration::ZERO, None, Vec::new());
        let mut next_bytes = plan.touched_bytes;
        loop {
            let round = plan.round(next_bytes, history.throttle_percent());
            elapsed = elapsed.saturating_add(round.duration + round.harvest);
            rounds.push(ForecastRound {
                sent_bytes: next_bytes,
                duration: round.duration,
                dirty_bytes: round.dirty_bytes(),
            });
            next_bytes = round.dirty_bytes();
            history.push(round);
            let downtime =
                Downtime::predicted(&history, &plan.cost, &plan.handover, None).unwrap_or_default();
            let now_stuck = plan.convergence(&history, downtime, elapsed).diverging();
            history.judged(now_stuck.map(|diverging| diverging.why));
            diverging = diverging.or(now_stuck);
            let decision = loop {
                match plan.convergence(&history, downtime, elapsed).decide() {
                    Decision::Look(interval) => {
                        history.looked(plan.look(interval));
                        elapsed = elapsed.saturating_add(interval);
                    }
                    other => break other,
                }
            };
            let weighs = plan.limits.if_stuck.is_auto();
            if weighs && matches!(decision, Decision::Throttle(_) | Decision::Relax(_) | Decision::GiveUp) {
                let offers = plan.convergence(&history, downtime, elapsed).offers();
                courses = offers.iter().map(ToString::to_string).collect();
            }
            let end = match decision {
                Decision::AnotherRound | Decision::Look(_) => continue,
                Decision::Throttle(percent) => {
                    let expected_bytes =
                        plan.convergence(&history, downtime, elapsed).expected_bytes(percent);
                    history.throttled(percent, expected_bytes);
                    continue;
                }
                Decision::Relax(allowed) => {
                    history.relaxed_to(allowed);
                    if !plan.convergence(&history, downtime, elapsed).fits() {
                        continue;
                    }
                    Decision::Switch
                }
                end => end,
            };
            let allowed = plan.convergence(&history, downtime, elapsed).allowed();
            let advice = (end == Decision::GiveUp)
                .then(|| plan.convergence(&history, downtime, elapsed).given_up().help);
            let sent_bytes = rounds.iter().map(|round| round.sent_bytes).sum::<u64>() + next_bytes;
            let total = elapsed.saturating_add(downtime.total());
            let throttle_percent = history.throttle_percent();
            let pause = if end == Decision::GiveUp { Duration::ZERO } else { downtime.total() };
            let lost = Lost { downtime: pause, ..history.lost() };
            return Self {
                rounds,
                end,
                throttle_percent,
                allowed,
                downtime,
                total,
                sent_bytes,
                lost,
                courses,
                diverging,
                advice,
            };
        }
    }
}

impl Plan {
    fn convergence<'plan>(
        &'plan self,
        history: &'plan History,
        predicted: Downtime,
        elapsed: Duration,
    ) -> Convergence<'plan> {
        Convergence { limits: &self.limits, history, predicted, elapsed }
    }

    /// A round that sends `sent_bytes` from a guest slowed by `throttle_percent`.
    fn round(&self, sent_bytes: u64, throttle_percent: u8) -> Round {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let seconds = sent_bytes as f64 / self.bandwidth.max(1.0);
        let busy = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST) + self.round_trip;
        let running = f64::from(100 - throttle_percent.min(99)) / 100.0;
        let dirty_bytes = self.curve.bytes_in((busy + self.harvest).as_secs_f64() * running);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "below RAM's size, not below 0"
        )]
        let dirty_bytes = (dirty_bytes as u64).min(self.touched_bytes);
        let lane = LaneLoad { bytes: sent_bytes, busy, fence: self.round_trip };
        let dirty_pages = dirty_bytes.div_ceil(PAGE_BYTES);
        let tracking =
            self.tracking_share.map(|share| (busy + self.harvest).mul_f64(running * share.clamp(0.0, 1.0)));
        Round {
            lanes: vec![lane],
            duration: busy,
            harvest: self.harvest,
            dirty_pages,
            throttle_percent,
            tracking,
            ..Round::default()
        }
    }

    /// A look at a guest at full speed.
    fn look(&self, interval: Duration) -> DirtySample {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` clamps")]
        let dirty_bytes = self.curve.bytes_in(interval.as_secs_f64()) as u64;
        DirtySample { interval, dirty_bytes: dirty_bytes.min(self.touched_bytes) }
    }
}

/// A year: no operator waits for a longer round.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::diverging::Why;
    use super::super::prediction::SAFETY;
    use super::*;

    const MB: u64 = 1_000_000;
    const GB: u64 = 1000 * MB;

    fn plan(samples: &[(u64, u64)], bandwidth_mbps: u64, if_stuck: &str) -> Plan {
        let sample = |&(millis, megabytes): &(u64, u64)| DirtySample {
            interval: Duration::from_millis(millis),
            dirty_bytes: megabytes * MB,
        };
        Plan {
            touched_bytes: 2 * GB,
            curve: DirtyCurve::new(&samples.iter().map(sample).collect::<Vec<_>>()),
            tracking_share: None,
            #[expect(clippy::cast_precision_loss, reason = "small")]
            bandwidth: (bandwidth_mbps * MB) as f64,
            round_trip: Duration::from_micros(100),
            harvest: Duration::from_micros(200),
            cost: SwitchCost::default(),
            handover: HandoverCost::default(),
            limits: Limits {
                downtime: Duration::from_millis(50),
                if_stuck: if_stuck.parse().unwrap(),
                ..Limits::default()
            },
        }
    }

    #[test]
    fn an_idle_guest_moves_in_two_rounds_of_which_the_second_is_empty() {
        let forecast = Forecast::of(&plan(&[(1000, 0)], 1000, "abort"));
        assert_eq!((forecast.end, forecast.rounds.len()), (Decision::Switch, 2));
        assert_eq!(forecast.sent_bytes, 2 * GB);
        assert!(forecast.total > Duration::from_secs(2) && forecast.total < Duration::from_millis(2020));
        assert!(forecast.diverging.is_none());
    }

    #[test]
    fn an_idle_guest_of_any_size_moves_by_the_third_round_with_default_limits() {
        const MIB: u64 = 1 << 20;
        const TIB: u64 = MIB << 20;
        for touched_bytes in [256 * MIB, 4096 * MIB, TIB / 16, TIB, 4 * TIB, 12 * TIB] {
            for (round_trip_us, revoke_us, record_us) in [(10, 200, 1000), (500, 20_000, 10_000)] {
                // What its kernel does: some thousand pages a second, the same ones again and again.
                let mut plan = plan(&[(1, 1), (1000, 16), (60_000, 64)], 12_500, "throttle");
                plan.touched_bytes = touched_bytes;
                plan.round_trip = Duration::from_micros(round_trip_us);
                // KVM copies a bit for each page, and this side reads it: 4 GB/s.
                plan.harvest = Duration::from_nanos(touched_bytes / PAGE_BYTES / 8 / 4);
                let [revoke, record] = [revoke_us, record_us].map(Duration::from_micros);
                plan.handover = HandoverCost {
                    revoke,
                    record_here: record,
                    record_there: record,
                    ..HandoverCost::default()
                };
                plan.limits = Limits::default();
                let forecast = Forecast::of(&plan);
                assert_eq!(forecast.end, Decision::Switch, "{touched_bytes}: {forecast:?}");
                assert!(forecast.rounds.len() <= 3, "{touched_bytes}: {forecast:?}");
                assert!(forecast.diverging.is_none(), "{touched_bytes}: {forecast:?}");
            }
        }
    }

    #[test]
    fn a_limit_that_no_switch_keeps_is_told_and_acted_on_after_two_rounds() {
        for (chain, end) in
            [("throttle", Decision::GiveUp), ("throttle,stop", Decision::Stop), ("relax", Decision::Switch)]
        {
            let mut plan = plan(&[(1000, 1)], 1000, chain);
            plan.handover.revoke = Duration::from_millis(100);
            let forecast = Forecast::of(&plan);
            assert_eq!((forecast.end, forecast.rounds.len()), (end, 2), "{chain}");
            let diverging = forecast.diverging.unwrap();
            assert_eq!(diverging.why, Why::LimitTooLow);
            assert!(diverging.fixed > Duration::from_millis(100), "{diverging:?}");
        }
    }

    #[test]
    fn a_guest_slower_than_the_link_moves_by_itself_and_one_faster_does_not() {
        // It writes 100 MB/s, over a gigabyte.
        let samples = [(100, 10), (1000, 100), (10_000, 1000), (20_000, 1000)];
        for bandwidth in [1000, 200, 143, 118] {
            let forecast = Forecast::of(&plan(&samples, bandwidth, "abort"));
            assert_eq!(forecast.end, Decision::Switch, "{bandwidth}");
            assert!(forecast.downtime.total().mul_f64(SAFETY) <= Duration::from_millis(50));
            assert!(forecast.diverging.is_none());
        }
        let forecast = Forecast::of(&plan(&samples, 90, "abort"));
        assert_eq!(forecast.end, Decision::GiveUp);
        assert!(forecast.downtime.total() > Duration::from_secs(10));
        assert!(forecast.diverging.is_some());
        assert_eq!(Forecast::of(&plan(&samples, 90, "stop")).end, Decision::Stop);
        let throttled = Forecast::of(&plan(&samples, 90, "throttle"));
        assert_eq!(throttled.end, Decision::Switch);
        assert!((10..60).contains(&throttled.throttle_percent), "{}", throttled.throttle_percent);
    }

    #[test]
    fn a_small_working_set_is_sent_at_the_end_however_fast_it_is_written() {
        let samples = [(1, 20), (10, 30), (1000, 30)];
        let forecast = Forecast::of(&plan(&samples, 1000, "abort"));
        assert_eq!((forecast.end, forecast.rounds.len()), (Decision::Switch, 2));
        assert!(forecast.downtime.send > Duration::from_millis(29));
    }

    /// 64 MB of 256 written over and over, at a link of 110 MB/s.
    fn hot(mbps: u64, if_stuck: &str) -> Plan {
        let samples = [(1, mbps / 1000), (64_000 / mbps, 64), (64_000, 64)];
        let mut plan = plan(&samples, 110, if_stuck);
        (plan.touched_bytes, plan.limits.downtime) = (256 * MB, Duration::from_millis(300));
        plan
    }

    #[test]
    fn a_hot_set_that_is_written_over_and_over_costs_no_more_than_to_stop_it_at_once() {
        for mbps in [400, 2000, 10_000] {
            let stopped = Forecast::of(&hot(mbps, "stop")).lost.total();
            let forecast = Forecast::of(&hot(mbps, "auto"));
            assert_eq!(forecast.end, Decision::Switch, "{mbps} MB/s");
            assert!(forecast.lost.total() <= stopped.mul_f64(1.1), "{mbps} MB/s: {forecast:?}");
            assert!(forecast.downtime.total() <= forecast.allowed);
            assert_eq!(forecast.throttle_percent, 0);
            assert!(forecast.courses.iter().any(|course| course.contains("slow the guest")), "{forecast:?}");
        }
    }

    #[test]
    fn what_cannot_end_within_its_limits_is_given_up_as_soon_as_that_is_known() {
        let mut plan = hot(10_000, "auto");
        plan.limits.downtime_max = Some(plan.limits.downtime);
        plan.limits.throttle_max_percent = 50;
        let forecast = Forecast::of(&plan);
        assert_eq!(forecast.end, Decision::GiveUp);
        assert!(forecast.rounds.len() <= 8, "{}", forecast.rounds.len());
        assert_eq!(forecast.lost.total(), Duration::ZERO, "it was not slowed in vain");
        let diverging = forecast.diverging.unwrap();
        assert!(diverging.to_string().contains("at least"), "{diverging}");
    }

    #[test]
    fn each_advice_holds_when_it_is_followed() {
        let advised = |plan: &Plan| {
            let forecast = Forecast::of(plan);
            assert_eq!(forecast.end, Decision::GiveUp);
            forecast.advice.unwrap()
        };
        let linear = plan(&[(100, 20), (1000, 200), (10_000, 2000)], 150, "throttle");
        for (name, plan) in [("hot", hot(400, "auto")), ("very hot", hot(10_000, "auto")), ("linear", linear)]
        {
            let mut plan = plan;
            (plan.limits.throttle_max_percent, plan.limits.downtime_max) = (0, Some(plan.limits.downtime));
            plan.limits.rounds_max = 60;
            let help = advised(&plan);
            let moves = |plan: &Plan, what: &str| {
                let forecast = Forecast::of(plan);
                assert_eq!(forecast.end, Decision::Switch, "{name}: {what} as in {help}");
            };
            let mut longer = plan.clone();
            longer.limits.downtime = help.downtime.unwrap();
            longer.limits.downtime_max = help.downtime;
            moves(&longer, "downtime");
            let faster = Plan {
                bandwidth: help.bandwidth.unwrap_or_else(|| panic!("{name}: {help}")),
                ..plan.clone()
            };
            moves(&faster, "bandwidth");
            for chain in ["auto", "throttle"] {
                let mut slower = plan.clone();
                let Some(percent) = help.throttle_percent else { continue };
                slower.limits.throttle_max_percent = percent;
                slower.limits.if_stuck = chain.parse().unwrap();
                moves(&slower, "throttle");
            }
            assert!(name != "linear" || help.throttle_percent.is_some(), "{help}");
        }
    }

    proptest! {
        #[test]
        fn every_forecast_ends_and_keeps_what_it_says(
            samples in proptest::collection::vec((0u64..100_000, 0u64..100_000), 0..6),
            bandwidth_mbps in 1u64..100_000,
            downtime_ms in 0u64..10_000,
            chain in prop::sample::select(vec!["auto", "throttle", "relax", "stop", "abort", "relax,throttle,stop"]),
            lost_max_ms in prop::option::of(1u64..5000),
        ) {
            let mut plan = plan(&samples, bandwidth_mbps, chain);
            plan.limits.downtime = Duration::from_millis(downtime_ms);
            plan.limits.lost_max = lost_max_ms.map(Duration::from_millis);
            let forecast = Forecast::of(&plan);
            let keeps = plan.limits.lost_max.is_none_or(|most| forecast.lost.total() <= most);
            prop_assert!(keeps || forecast.end == Decision::GiveUp, "{:?}", forecast.lost);
            prop_assert!(forecast.rounds.len() <= 100);
            prop_assert!(forecast.sent_bytes >= plan.touched_bytes);
            prop_assert!(forecast.allowed <= plan.limits.downtime_relaxed_max());
            prop_assert!(forecast.total >= forecast.downtime.total());
            match forecast.end {
                Decision::Switch => {
                    prop_assert!(forecast.downtime.total().mul_f64(SAFETY) <= forecast.allowed);
                }
                Decision::Stop => prop_assert!(plan.limits.if_stuck.ends_with_stop()),
                Decision::GiveUp if chain == "auto" => {}
                Decision::GiveUp => {
                    prop_assert!(!plan.limits.if_stuck.ends_with_stop() || lost_max_ms.is_some());
                }
                other => prop_assert!(false, "{other:?} is no end"),
            }
        }

        #[test]
        fn below_the_links_bandwidth_a_guest_moves_without_being_slowed(
            share in 1u64..86,
            bandwidth_mbps in 20u64..20_000,
        ) {
            // Bytes in a second, so that a small share of a small bandwidth is not rounded away.
            let interval = Duration::from_secs(1);
            let sample = DirtySample { interval, dirty_bytes: share * bandwidth_mbps * MB / 100 };
            let mut plan = plan(&[], bandwidth_mbps, "throttle,abort");
            plan.curve = DirtyCurve::new(&[sample]);
            let forecast = Forecast::of(&plan);
            prop_assert_eq!(forecast.end, Decision::Switch);
            prop_assert_eq!(forecast.throttle_percent, 0);
            #[expect(clippy::cast_precision_loss, reason = "a share")]
            let ideal = plan.touched_bytes as f64 / (1.0 - share as f64 / 100.0);
            #[expect(clippy::cast_precision_loss, reason = "a share")]
            let ratio = forecast.sent_bytes as f64 / ideal;
            prop_assert!(ratio <= 1.15, "{} of {}", ratio, ideal);
        }
    }
}

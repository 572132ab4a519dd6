use super::*;
use crate::convergence::curve::DirtySample;
use crate::convergence::history::tests::{round, round_in};
use crate::convergence::prediction::{HandoverCost, SwitchCost};

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
        let predicted = Downtime::predicted(&self.history, &COST, &HandoverCost::default(), None).unwrap();
        Convergence { limits: &self.limits, history: &self.history, predicted, elapsed: self.elapsed }
    }

    fn after(&mut self, round: Round) -> Decision {
        self.history.push(round);
        let diverging = self.convergence().diverging();
        self.history.judged(diverging.map(|diverging| diverging.why));
        let mut decision = self.convergence().decide();
        if let Decision::Look(_) = decision {
            self.history.cannot_look();
            decision = self.convergence().decide();
        }
        match decision {
            Decision::Throttle(percent) => {
                let expected_bytes = self.convergence().expected_bytes(percent);
                self.history.throttled(percent, expected_bytes);
            }
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
        assert_eq!(first.after(round(1000, left)), Decision::AnotherRound, "how fast that goes is not sure");
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
    assert_eq!(diverging.help.downtime, Some(Duration::from_millis(1265)));
    let text = format!("{diverging}; it would take {}", diverging.help);
    for part in ["at least 1038 MB/s of new pages", "1049 MB/s can be sent", "near 1000 ms", "limit of 126"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(diverging.help.throttle_percent, None, "it may write all of that much faster");
    let millis = Duration::from_millis;
    made.history.looked(DirtySample { interval: millis(10), dirty_bytes: 12 << 20 });
    let diverging = made.convergence().diverging().unwrap();
    let text = format!("{diverging}; it would take {}", diverging.help);
    for part in ["writes 1258 MB/s of new pages", "link of", "to slow the guest by"] {
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
fn a_throttle_without_effect_is_taken_back_after_two_rounds_and_not_tried_again() {
    let mut made = Made::new(50, "throttle");
    let decisions = made.decisions_of_a_guest_too_fast(40);
    let most = decisions.iter().position(|&decision| decision == Decision::Throttle(99)).unwrap();
    assert!(most < 12, "{decisions:?}");
    assert_eq!(decisions[most + 1..most + 3], [Decision::AnotherRound, Decision::Throttle(0)]);
    assert!(
        decisions[most + 3..].iter().all(|&decision| decision == Decision::AnotherRound),
        "{decisions:?}"
    );
    let given_up = made.convergence().given_up();
    assert_eq!(given_up.tried.map(|tried| tried.throttle_percent), Some(99));
    assert!(given_up.to_string().contains("to slow it by 99 % in"), "{given_up}");
}

#[test]
fn a_throttle_with_the_effect_that_was_predicted_stays() {
    let mut made = Made::new(50, "throttle");
    made.limits.throttle_max_percent = 50;
    made.decisions_of_a_guest_too_fast(2);
    let (mut decisions, mut sent) = (Vec::new(), 1000);
    while decisions.last() != Some(&Decision::Switch) {
        let dirty = sent * (100 - u64::from(made.history.throttle_percent())) / 100;
        decisions.push(made.after(round(sent, dirty)));
        sent = dirty;
        assert!(decisions.len() < 60, "{decisions:?}");
    }
    assert!(matches!(decisions[0], Decision::Throttle(_)), "{decisions:?}");
    assert!(!decisions.contains(&Decision::Throttle(0)), "{decisions:?}");
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
    assert_eq!(decisions, [again, again, relaxed(150), relaxed(225), relaxed(300), again, Decision::GiveUp]);
    let mut enough = Made::new(100, "relax,abort");
    let rounds = [(1000, 180), (180, 180), (180, 180), (180, 180)].map(|(sent, dirty)| round(sent, dirty));
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
        assert_eq!(diverging.help.downtime, Some(Duration::from_micros(12_650)));
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
        (Why::LimitTooLow, Some(Duration::from_micros(12_650)))
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
    assert!(diverging.help.to_string().contains("or a bandwidth limit of"), "{}", diverging.help);
}

/// A look inside a round.
fn inside(millis: u64, sent_mib: u64, written_mib: u64) -> Inside {
    let lasted = Duration::from_millis(millis);
    let left = Duration::from_secs(100);
    Inside { lasted, sent_bytes: sent_mib << 20, written_bytes: written_mib << 20, left }
}

#[test]
fn a_guest_that_is_too_fast_shows_inside_its_first_round() {
    let (before, now) = (inside(700, 700, 1400), inside(1400, 1400, 2800));
    for (chain, decision) in [
        ("auto", Decision::AnotherRound),
        ("throttle", Decision::Throttle(20)),
        ("throttle,abort", Decision::Throttle(20)),
        ("abort", Decision::GiveUp),
        ("relax,abort", Decision::AnotherRound),
        ("stop", Decision::AnotherRound),
    ] {
        let made = Made::new(300, chain);
        let predicted = Downtime::default();
        let convergence =
            Convergence { limits: &made.limits, history: &made.history, predicted, elapsed: made.elapsed };
        let diverging = convergence.diverging_inside(&before, &now).unwrap();
        let text = format!("{diverging}; it would take {}", diverging.help);
        for part in ["writes 2097 MB/s of new pages and 1049 MB/s can be sent", "near 2800 ms", "by 65 %"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(convergence.decide_inside(&before, &now), decision, "{chain}");
        for (before, now, why) in [
            (inside(700, 700, 600), inside(1400, 1400, 1300), "it is slower"),
            (inside(700, 700, 2000), inside(1400, 1400, 2100), "it has written its hot set"),
            (inside(70, 70, 140), inside(140, 140, 280), "that much fits the downtime"),
            (inside(700, 0, 100), inside(1400, 0, 200), "nothing was sent"),
            (before, Inside { left: Duration::from_secs(4), ..now }, "the round is over soon"),
        ] {
            assert_eq!(convergence.diverging_inside(&before, &now), None, "{why}");
        }
    }
}

#[test]
fn a_guest_that_is_slowed_inside_a_round_is_slowed_on_until_that_is_enough() {
    let mut made = Made::new(300, "throttle,abort");
    made.limits.throttle_max_percent = 30;
    made.history.begins_round();
    for decision in [Decision::Throttle(20), Decision::Throttle(30), Decision::GiveUp] {
        let predicted = Downtime::default();
        let (limits, history) = (&made.limits, &made.history);
        let convergence = Convergence { limits, history, predicted, elapsed: Duration::ZERO };
        let decided = convergence.decide_inside(&inside(700, 700, 1400), &inside(1400, 1400, 2800));
        assert_eq!(decided, decision);
        if let Decision::Throttle(percent) = decided {
            made.history.throttled(percent, 1.0);
        }
    }
    let futile = [(); 3].map(|()| {
        made.history.push(round(1000, 1000));
        made.history.futile_throttle().is_some()
    });
    assert_eq!(futile, [false, false, true], "the first of these rounds ran at several speeds");
}

/// Rounds of a guest that writes a hot set of 100 MiB faster than can be seen, named by its VMM, until the
/// decision is neither another round nor a throttle.
fn decisions_of_a_named_hot_set(made: &mut Made) -> Vec<Decision> {
    let millis = Duration::from_millis;
    let named = |duration, dirty_mib| Round {
        duration: millis(duration),
        named_pages: 25_600,
        naming: millis(400),
        rewritten_percent: Some(98),
        ..round_in(100, 330, dirty_mib)
    };
    made.after(round_in(512, 5000, 100));
    let rounds = [(735, 100), (760, 97), (720, 101), (755, 99), (730, 95), (740, 102), (765, 98)];
    let mut decisions = Vec::new();
    for (duration, dirty_mib) in rounds.into_iter().cycle().take(60) {
        decisions.push(made.after(named(duration, dirty_mib)));
        if !matches!(decisions.last(), Some(Decision::AnotherRound | Decision::Throttle(_))) {
            break;
        }
    }
    decisions
}

#[test]
fn a_named_hot_set_is_given_the_downtime_that_naming_and_sending_it_take() {
    let mut made = Made::new(300, "auto");
    let decisions = decisions_of_a_named_hot_set(&mut made);
    let (last, before) = decisions.split_last().unwrap();
    assert!(before.iter().all(|decision| *decision == Decision::AnotherRound), "{decisions:?}");
    let Decision::Relax(downtime) = *last else { panic!("{decisions:?}") };
    // 330 ms to send it, 400 ms to name it, 10 ms to load; and 15 %.
    assert!((820..880).contains(&downtime.as_millis()), "{downtime:?}");
    assert!(made.convergence().fits());
}

#[test]
fn a_named_hot_set_that_does_not_fit_the_limits_is_not_slowed_by_a_little_in_vain() {
    let mut made = Made::new(100, "auto");
    let decisions = decisions_of_a_named_hot_set(&mut made);
    assert_eq!(decisions.last(), Some(&Decision::GiveUp), "{decisions:?}");
    let throttles = decisions.iter().filter_map(|decision| match decision {
        Decision::Throttle(percent @ 1..) => Some(*percent),
        _ => None,
    });
    let throttles: Vec<_> = throttles.collect();
    assert!(throttles.iter().all(|&percent| percent >= 45) && throttles.len() <= 5, "{decisions:?}");
    let given_up = made.convergence().given_up();
    let text = format!("{given_up}; it would take {}", given_up.help);
    for part in ["writes at least", "MB/s can be named by its VMM and sent", "a downtime limit of 9"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("link of"), "no link names pages faster: {text}");
}

#[test]
fn hot_pages_that_wait_are_counted_as_left_and_only_once_as_written() {
    let pages = |mib: u64| mib * 1024 * 1024 / PAGE_BYTES;
    let mut made = Made::new(100, "auto");
    made.after(round(1000, 200));
    made.after(round(200, 200));
    let (most, bandwidth) = made.convergence().waiting_max();
    // 100 ms with a margin of 15 %, less 10 ms to load, at 1 MiB/ms; 0.8 of that.
    let limit_mib = 0.8 * (100.0 / SAFETY - 10.0);
    assert!((most / 1_048_576.0 - limit_mib).abs() < 0.1, "{most}");
    assert!((bandwidth / 1_048_576_000.0 - 1.0).abs() < 0.01, "{bandwidth}");
    made.history.waits(pages(50));

    // 150 MiB were sent. 60 MiB besides the 50 that waited are dirty, and 20 of these were not written again.
    let waited = Round { waited_pages: pages(50), unwritten_pages: pages(20), ..round(150, 110) };
    assert!((waited.dirty_rate() / 1_048_576.0 - 90.0 / 0.150).abs() < 1.0, "{}", waited.dirty_rate());
    made.history.push(waited);
    made.history.waits(pages(50));
    let shrink = made.history.shrink().unwrap();
    assert!((shrink - (60.0f64 / 200.0).sqrt()).abs() < 0.01, "of what a round sends: {shrink}");
    let send = made.convergence().predicted.send.as_secs_f64() * 1e3;
    assert!((send - 110.0).abs() < 0.1, "all that is left, {send} ms");
    assert_eq!(made.convergence().diverging(), None);
    let ends = made.convergence().ahead().unwrap().ends(0);
    let next = ends[1].until_switch.as_secs_f64() * 1e3;
    assert!((next - 60.0).abs() < 0.1, "the next round sends only the rest, in {next} ms");
    assert!(ends[1].lost.downtime > Duration::from_millis(60), "hot pages are left whatever is sent");
    assert!(ends[1].lost.downtime < ends[0].lost.downtime);
}

#[test]
fn no_page_waits_where_a_switch_could_not_carry_it_or_the_guest_is_slowed() {
    let mut made = Made::new(5, "auto");
    made.after(round(1000, 200));
    assert_eq!(made.convergence().waiting_max().0, 0.0, "loading alone takes longer");
    made.limits.downtime = Duration::from_secs(1);
    assert!(made.convergence().waiting_max().0 > 0.0);
    made.limits.lost_max = Some(Duration::from_millis(20));
    let (most, bandwidth) = made.convergence().waiting_max();
    assert!(most < 0.01 * bandwidth, "the guest may lose 20 ms, of which loading takes 10");
    made.history.throttled(20, 1e9);
    assert_eq!(made.convergence().waiting_max().0, 0.0);
}

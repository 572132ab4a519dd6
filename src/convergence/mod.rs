//! When to stop sending rounds, and what to do when they do not get smaller.
//!
//! Pure functions over what the rounds measured: no clock is read and nothing is sent. The model is the usual one: with
//! `b` bytes a second on the wire, pausing now costs the dirty bytes divided by `b`, plus what a switch costs anyway.

use std::time::Duration;

use crate::memory::PAGE_BYTES;

/// What ends a migration's rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the guest may stand still at the switch.
    pub downtime: Duration,
    /// How many rounds there may be while the guest runs.
    pub rounds_max: u32,
    /// How far the guest may be slowed when the rounds do not get smaller, in percent; 0 forbids it.
    pub throttle_max_percent: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { downtime: Duration::from_millis(300), rounds_max: 30, throttle_max_percent: 99 }
    }
}

/// What one round while the guest runs was like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Bytes of pages sent.
    pub sent_bytes: u64,
    /// How long that took, up to the last fence.
    pub duration: Duration,
    /// Pages that were dirty again at its end.
    pub dirty_pages: u64,
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what is dirty in another round.
    AnotherRound,
    /// Slow the guest to this many percent, then send another round.
    Throttle(u8),
    /// Pause the guest and switch.
    Switch,
    /// Give up: the guest writes faster than its pages can be sent.
    GiveUp,
}

/// What a switch costs besides sending pages: pausing, saving, loading, five messages. An assumption, kept on the safe side.
const SWITCH_COST: Duration = Duration::from_millis(15);

/// A round counts as progress if it leaves at most this part of the dirty pages that the round before left, in percent.
const PROGRESS_PERCENT: u64 = 85;

/// The first step of throttling, and each further one, in percent.
const THROTTLE_STEP_PERCENT: u8 = 20;

/// Decides after each round. `rounds` is all of them so far, `throttle_percent` how far the guest is slowed now.
#[must_use]
pub fn decide(limits: &Limits, rounds: &[Round], throttle_percent: u8) -> Decision {
    let Some(last) = rounds.last() else { return Decision::AnotherRound };
    if predicted_downtime(rounds).is_some_and(|downtime| downtime <= limits.downtime) {
        return Decision::Switch;
    }
    if u32::try_from(rounds.len()).unwrap_or(u32::MAX) >= limits.rounds_max {
        return Decision::GiveUp;
    }
    // The first round sends all of RAM, so only those after it tell how the dirty set develops.
    let before = rounds.len().checked_sub(2).map(|index| rounds[index]);
    let stuck = before.is_some_and(|before| last.dirty_pages * 100 > before.dirty_pages * PROGRESS_PERCENT);
    match throttle_percent.saturating_add(THROTTLE_STEP_PERCENT).min(limits.throttle_max_percent) {
        more if stuck && more > throttle_percent => Decision::Throttle(more),
        _ => Decision::AnotherRound,
    }
}

/// How long the guest would stand still if it were paused now; `None` before anything was measured.
#[must_use]
pub fn predicted_downtime(rounds: &[Round]) -> Option<Duration> {
    let dirty_bytes = rounds.last()?.dirty_pages * PAGE_BYTES;
    if dirty_bytes == 0 {
        return Some(SWITCH_COST);
    }
    let bytes_per_second = bandwidth(rounds)?;
    #[expect(clippy::cast_precision_loss, reason = "a prediction")]
    let sending = Duration::try_from_secs_f64(dirty_bytes as f64 / bytes_per_second).unwrap_or(Duration::MAX);
    Some(sending.saturating_add(SWITCH_COST))
}

/// Bytes a second over the rounds that sent enough to tell, or over all if none did.
#[must_use]
pub fn bandwidth(rounds: &[Round]) -> Option<f64> {
    const TELLING_BYTES: u64 = 4 << 20;
    let over = |rounds: &mut dyn Iterator<Item = &Round>| {
        let (bytes, time) = rounds.fold((0, Duration::ZERO), |(bytes, time), round| {
            (bytes + round.sent_bytes, time + round.duration)
        });
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        (bytes > 0 && !time.is_zero()).then(|| bytes as f64 / time.as_secs_f64())
    };
    // The latest of them: what the link gives now, with the guest as it is now.
    over(&mut rounds.iter().rev().filter(|round| round.sent_bytes >= TELLING_BYTES).take(3))
        .or_else(|| over(&mut rounds.iter()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn round(sent_mib: u64, millis: u64, dirty_mib: u64) -> Round {
        Round {
            sent_bytes: sent_mib * MIB,
            duration: Duration::from_millis(millis),
            dirty_pages: dirty_mib * MIB / PAGE_BYTES,
        }
    }

    fn limits(downtime_ms: u64) -> Limits {
        Limits { downtime: Duration::from_millis(downtime_ms), ..Limits::default() }
    }

    #[test]
    fn it_switches_as_soon_as_the_rest_fits_the_limit() {
        // 1 MiB a millisecond.
        assert_eq!(decide(&limits(300), &[round(1000, 1000, 290)], 0), Decision::AnotherRound);
        assert_eq!(decide(&limits(300), &[round(1000, 1000, 280)], 0), Decision::Switch);
        assert_eq!(decide(&limits(300), &[round(0, 1, 0)], 0), Decision::Switch, "nothing to send at all");
    }

    #[test]
    fn a_limit_that_no_switch_can_meet_is_not_met_by_luck() {
        let rounds = [round(100, 100, 0), round(1, 1, 0)];
        assert_eq!(decide(&limits(1), &rounds, 0), Decision::AnotherRound);
    }

    #[test]
    fn rounds_that_get_smaller_go_on_and_others_throttle_in_steps() {
        let smaller = [round(1000, 1000, 800), round(800, 800, 600)];
        assert_eq!(decide(&limits(50), &smaller, 0), Decision::AnotherRound);
        let same = [round(1000, 1000, 800), round(800, 800, 790)];
        assert_eq!(decide(&limits(50), &same, 0), Decision::Throttle(20));
        assert_eq!(decide(&limits(50), &same, 80), Decision::Throttle(99));
        assert_eq!(decide(&limits(50), &same, 99), Decision::AnotherRound);
        let never = Limits { throttle_max_percent: 0, ..limits(50) };
        assert_eq!(decide(&never, &same, 0), Decision::AnotherRound);
    }

    #[test]
    fn it_gives_up_after_the_last_round_allowed() {
        let rounds = vec![round(1000, 1000, 1000); 30];
        assert_eq!(decide(&limits(50), &rounds, 99), Decision::GiveUp);
        assert_ne!(decide(&limits(50), &rounds[1..], 99), Decision::GiveUp);
    }

    #[test]
    fn bandwidth_is_that_of_recent_rounds_that_were_long_enough() {
        let rounds = [
            round(1000, 1000, 0),
            round(100, 1000, 0),
            round(100, 1000, 0),
            round(100, 1000, 0),
            round(1, 1000, 0),
        ];
        let measured = bandwidth(&rounds).unwrap() / 1_048_576.0;
        assert!((measured - 100.0).abs() < 1.0, "{measured}");
        assert_eq!(bandwidth(&[]), None);
        assert_eq!(bandwidth(&[round(0, 5, 0)]), None);
    }
}

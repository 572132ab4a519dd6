use std::num::NonZeroU64;
use std::time::Duration;

use super::bucket::Bucket;
use super::history::History;
use crate::memory::PAGE_BYTES;

/// How far above a prediction the downtime may be: a switch begins when the prediction times this factor
/// meets the limit. Nine of ten predictions are within 15 % (`bench/README.md`).
pub const SAFETY: f64 = 1.15;

/// How much of a saved state the source buffers between the VMM and the connection, in bytes: what may be
/// left to send when the VMM has written everything.
pub(crate) const STATE_HELD_MAX: usize = 2 << 20;

/// The costs of a switch that cannot be measured before one: a running guest cannot be paused, saved or
/// loaded for a trial.
///
/// The default is the cost for a small VMM, rounded up. A VMM with devices that take longer to save and to
/// load states its costs in [`Options`](crate::source::Options).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchCost {
    /// Stopping the vCPUs.
    pub pause: Duration,
    /// Saving the state of vCPUs and devices.
    pub save: Duration,
    /// The length of that state.
    pub state_bytes: u64,
    /// Loading it at the destination.
    pub load: Duration,
    /// Starting the vCPUs at the destination.
    pub start: Duration,
}

impl Default for SwitchCost {
    fn default() -> Self {
        Self {
            pause: Duration::from_micros(500),
            save: Duration::from_micros(500),
            state_bytes: 64 << 10,
            load: Duration::from_micros(500),
            start: Duration::from_micros(500),
        }
    }
}

/// The bandwidth limit at the moment of a prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkLimit {
    /// The limit itself.
    pub bytes_per_second: NonZeroU64,
    /// For how long the lanes have sent nothing, or less than they may: a lane overslept, or a round ended.
    pub unsent: Duration,
}

/// The other costs of a handover: known in advance, and independent of the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HandoverCost {
    /// Registering memory for the last pages, if they exceed what may be registered at once.
    pub register: Duration,
    /// Registering memory ahead of the pause, while the guest still writes.
    pub register_ahead: Duration,
    /// Revoking remote access at the destination.
    pub revoke: Duration,
    /// A record at the source: one is part of the switch, before GO.
    pub record_here: Duration,
    /// A record at the destination: one before PREPARED, and one before the guest runs.
    pub record_there: Duration,
}

/// A downtime as the sum of its parts: predicted, or measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// Stopping the vCPUs.
    pub pause: Duration,
    /// Saving the state of vCPUs and devices. The state travels meanwhile, so for a long state this is its
    /// time on the link.
    pub save: Duration,
    /// The last harvest.
    pub harvest: Duration,
    /// Waiting until memory for the last pages is registered.
    pub register: Duration,
    /// Sending the last pages, up to the last fence, without that wait. If the VMM names pages, a prediction
    /// includes the wait for their names.
    pub send: Duration,
    /// Comparing, at both ends.
    pub verify: Duration,
    /// Sending the rest of the state and receiving the answer, without the destination's work in between
    /// except its record.
    pub transfer: Duration,
    /// Revoking remote access at the destination.
    pub revoke: Duration,
    /// Loading the state at the destination.
    pub load: Duration,
    /// From PREPARED to the report that the guest runs, including two records.
    pub start: Duration,
}

impl Downtime {
    /// All parts.
    #[must_use]
    pub fn total(&self) -> Duration {
        let Self { pause, save, harvest, register, send, verify, transfer, revoke, load, start } = *self;
        pause + save + harvest + register + send + verify + transfer + revoke + load + start
    }

    /// The sum of all parts, if each is known: the time to send the remaining pages is unknown until
    /// something was sent ([`History::bandwidth`]).
    #[must_use]
    pub fn known(&self) -> Option<Duration> {
        (self.send < FOREVER).then(|| self.total())
    }

    /// The downtime if the guest were paused now, without comparing: `None` before the first round.
    ///
    /// Bandwidth, round trip and harvest are measured round by round; `cost` and `handover` cannot be
    /// measured. The pages that the guest writes until it is paused have to be sent too. `limit` is the
    /// present one, which may be newer than the rounds. Where it caps the link, it is the bandwidth, and the
    /// last round makes up for what the limit has left unsent ([`Bucket`]).
    #[must_use]
    pub fn predicted(
        history: &History,
        cost: &SwitchCost,
        handover: &HandoverCost,
        limit: Option<LinkLimit>,
    ) -> Option<Self> {
        let last = history.rounds().last()?;
        let (round_trip, answer) = (history.round_trip(), history.answer());
        let (harvest, until_still) = (history.harvest(), last.harvest + handover.register_ahead + cost.pause);
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let left_bytes =
            (last.dirty_pages * PAGE_BYTES) as f64 + last.growth_rate() * until_still.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let most = limit.map_or(f64::INFINITY, |limit| limit.bytes_per_second.get() as f64);
        let bandwidth = history.bandwidth();
        let limit = limit.filter(|_| bandwidth.is_some_and(|bandwidth| bandwidth > LIMITED_SHARE * most));
        let bandwidth = if limit.is_some() { Some(most) } else { bandwidth };
        let made_up_for = limit.map_or(Duration::ZERO, |limit| {
            (limit.unsent + cost.pause + cost.save + harvest + history.overhead()).min(Bucket::AHEAD)
        });
        // A lane is likely to oversleep at the end of the last round as well.
        let oversleep = if limit.is_some() { history.late() } else { Duration::ZERO };
        let on_the_wire = |bytes: f64| match bandwidth {
            Some(bandwidth) => Duration::try_from_secs_f64(bytes / bandwidth).unwrap_or(FOREVER),
            // Only a guest without a non-zero page has unknown bandwidth and pages left.
            None if bytes == 0.0 => Duration::ZERO,
            None => FOREVER,
        };
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let named_seconds = left_bytes / PAGE_BYTES as f64 * history.naming_seconds();
        let naming = Duration::try_from_secs_f64(named_seconds).unwrap_or(FOREVER);
        // Most states are short; on a link of unknown bandwidth their time is negligible.
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let state_bytes = if bandwidth.is_some() { cost.state_bytes as f64 } else { 0.0 };
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let held_bytes = state_bytes.min(STATE_HELD_MAX as f64);
        Some(Self {
            pause: cost.pause,
            // The part that the source buffers is in flight when the VMM has written everything.
            save: cost.save.max(on_the_wire(state_bytes - held_bytes)),
            harvest,
            register: handover.register,
            send: (on_the_wire(left_bytes) + oversleep).saturating_sub(made_up_for)
                + naming
                + round_trip
                + history.overhead(),
            verify: Duration::ZERO,
            transfer: on_the_wire(held_bytes) + answer + handover.record_there,
            revoke: handover.revoke,
            load: cost.load,
            start: handover.record_here + answer + handover.record_there + cost.start,
        })
    }

    /// The same with nothing left to send: the lower bound, whatever the number of rounds. What a round takes
    /// besides sending is not part of the bound, because a disturbance may have made it long.
    #[must_use]
    pub fn without_pages(&self, history: &History) -> Self {
        let (register, verify) = (Duration::ZERO, Duration::ZERO);
        Self { register, send: history.round_trip(), verify, ..*self }
    }
}

/// A link that carries more than this share of its limit is capped by the limit: lanes oversleep now and
/// then.
const LIMITED_SHARE: f64 = 0.9;

/// Longer than any limit, but short enough to be added without overflow.
const FOREVER: Duration = Duration::from_secs(1 << 30);

#[cfg(test)]
mod tests {
    use super::super::history::tests::{history, round, round_in};
    use super::super::round::Round;
    use super::*;

    const NOTHING: SwitchCost = SwitchCost {
        pause: Duration::ZERO,
        save: Duration::ZERO,
        state_bytes: 0,
        load: Duration::ZERO,
        start: Duration::ZERO,
    };

    fn limit(mib_per_second: u64, unsent_ms: u64) -> Option<LinkLimit> {
        let bytes_per_second = NonZeroU64::new(mib_per_second << 20)?;
        Some(LinkLimit { bytes_per_second, unsent: Duration::from_millis(unsent_ms) })
    }

    fn predicted(history: &History, cost: &SwitchCost) -> Duration {
        Downtime::predicted(history, cost, &HandoverCost::default(), None).unwrap().total()
    }

    #[test]
    fn what_is_left_takes_as_long_as_the_link_says() {
        let history = history(&[round(1000, 300), round(300, 90)]);
        let all = predicted(&history, &NOTHING);
        assert!((all.as_secs_f64() - 0.090).abs() < 1e-6, "{all:?}");
    }

    #[test]
    fn every_part_counts() {
        let mut last = round(300, 90);
        last.harvest = Duration::from_millis(5);
        last.lanes[0].fence = Duration::from_millis(2);
        last.lanes[0].busy = Duration::from_millis(300);
        let mut first = round(1000, 300);
        first.lanes[0].fence = Duration::from_millis(7);
        first.harvest = Duration::from_millis(4);
        (first.overhead, last.overhead) = (Duration::from_millis(1), Duration::from_millis(6));
        let mut history = History::new(Duration::from_millis(3));
        history.push(first);
        history.push(last);
        let cost = SwitchCost {
            pause: Duration::from_millis(10),
            save: Duration::from_millis(20),
            state_bytes: 4 << 20,
            load: Duration::from_millis(40),
            start: Duration::from_millis(80),
        };
        let handover = HandoverCost {
            register: Duration::from_millis(1280),
            register_ahead: Duration::from_millis(7),
            revoke: Duration::from_millis(160),
            record_here: Duration::from_millis(320),
            record_there: Duration::from_millis(640),
        };
        let parts = Downtime::predicted(&history, &cost, &handover, None).unwrap();
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        assert_eq!((parts.pause, parts.save, parts.load), (cost.pause, cost.save, cost.load));
        assert_eq!(parts.harvest, Duration::from_millis(4), "the quickest");
        // 90 MiB, and 22 ms at 90 MiB in 305 ms, at 1 MiB/ms; a round trip of 2 ms, and what the second round
        // took besides.
        assert!((ms(parts.send) - (90.0 + 22.0 * 90.0 / 305.0 + 2.0 + 6.0)).abs() < 1e-3, "{parts:?}");
        // Two of the 4 MiB of state are sent while the VMM saves.
        assert!((ms(parts.transfer) - (2.0 + 3.0 + 640.0)).abs() < 1e-3, "{parts:?}");
        assert_eq!((parts.register, parts.revoke), (handover.register, handover.revoke));
        assert_eq!(parts.start, Duration::from_millis(80 + 3 + 320 + 640));
        assert!(parts.without_pages(&history).total() < parts.total() - Duration::from_millis(90 + 1280));
    }

    #[test]
    fn an_answer_takes_as_long_as_the_greeting_did_unless_the_greeting_was_delayed() {
        let transfer = |greeting_us: u64| {
            let mut history = History::new(Duration::from_micros(greeting_us));
            let mut only = round(1000, 0);
            only.lanes[0].fence = Duration::from_micros(100);
            history.push(only);
            Downtime::predicted(&history, &NOTHING, &HandoverCost::default(), None).unwrap().transfer
        };
        assert_eq!([50, 700, 30_000].map(transfer).map(|took| took.as_micros()), [50, 700, 1100]);
    }

    #[test]
    fn pages_that_a_vmm_has_to_name_first_take_that_time_too() {
        let named = |round: Round, pages, millis| Round {
            named_pages: pages,
            naming: Duration::from_millis(millis),
            ..round
        };
        let rounds = [named(round(1000, 100), 999_999, 9999), named(round_in(100, 100, 50), 25_600, 300)];
        let of = |rounds: &[Round]| predicted(&history(rounds), &NOTHING).as_secs_f64() * 1e3;
        // 50 MiB at 1 MiB/ms, and half of the 300 ms in which the names of 100 MiB were awaited.
        assert!((of(&rounds) - 200.0).abs() < 0.1, "{}", of(&rounds));
        let [first, second] = rounds;
        let small = named(round_in(0, 0, 50), 100, 50);
        let more = [first.clone(), second, small];
        assert!(
            (of(&more) - 224.0).abs() < 1.0,
            "what a pass takes besides names hardly counts: {}",
            of(&more)
        );
        assert!((of(&[first]) - 100.0).abs() < 0.1, "the first passes over all of RAM");
    }

    #[test]
    fn a_long_state_takes_what_the_link_needs_for_it_and_no_less_than_the_vmm() {
        let history = history(&[round(1000, 0)]);
        for (save_ms, added_ms) in [(0, 256.0), (100, 256.0), (300, 302.0)] {
            let cost = SwitchCost { save: Duration::from_millis(save_ms), state_bytes: 256 << 20, ..NOTHING };
            let added = predicted(&history, &cost).as_secs_f64() * 1e3;
            assert!((added - added_ms).abs() < 1e-3, "{added} ms with {save_ms} ms of saving");
        }
    }

    #[test]
    fn a_link_that_is_held_by_its_limit_has_that_bandwidth_and_makes_up_for_what_was_not_sent() {
        let mut last = round_in(95, 100, 95);
        last.harvest = Duration::from_millis(4);
        let history = history(&[round(1000, 95), last]);
        let cost = SwitchCost { pause: Duration::from_millis(1), ..NOTHING };
        let send = |mib_per_second: u64| {
            let limit = limit(mib_per_second, 4);
            Downtime::predicted(&history, &cost, &HandoverCost::default(), limit).unwrap().send.as_secs_f64()
                * 1e3
        };
        // 95 MiB, and what is written in 5 ms at 95 MiB in 104 ms.
        let left_mib = 95.0 + 5.0 * 95.0 / 104.0;
        // The quickest harvest takes no time: 4 + 1 ms in which nothing is sent.
        assert!((send(1000) - (left_mib - 5.0)).abs() < 0.1, "{}", send(1000));
        assert!((send(500) - (left_mib * 2.0 - 5.0)).abs() < 0.1, "{}", send(500));
        assert!((send(5000) - left_mib / 0.95).abs() < 0.1, "{}", send(5000));
    }

    #[test]
    fn what_a_limited_link_makes_up_for_is_what_was_not_sent_and_at_most_what_a_lane_may_be_ahead() {
        let mut history = history(&[round(1000, 95), round(95, 95)]);
        let send = |history: &History, unsent_ms: u64| {
            let limit = limit(1000, unsent_ms);
            let parts = Downtime::predicted(history, &NOTHING, &HandoverCost::default(), limit).unwrap();
            parts.send.as_secs_f64() * 1e3
        };
        for (unsent_ms, sooner_ms) in [(0, 0.0), (3, 3.0), (10, 10.0), (60, 10.0)] {
            let (at_once, later) = (send(&history, 0), send(&history, unsent_ms));
            assert!((at_once - later - sooner_ms).abs() < 0.1, "{unsent_ms}: {at_once} and {later}");
        }
        let before = send(&history, 3);
        history.push(Round { late: Duration::from_millis(40), ..round(95, 95) });
        assert!((send(&history, 3) - before).abs() < 0.1, "one round in three was late");
        history.push(Round { late: Duration::from_millis(2), ..round(95, 95) });
        assert!((send(&history, 3) - before - 2.0).abs() < 0.1, "rounds end late, so the last will too");
        let before = send(&history, 3);
        let (overhead, late) = (Duration::from_millis(2), Duration::from_millis(2));
        history.push(Round { overhead, late, ..round(95, 95) });
        assert!(
            (send(&history, 3) - before).abs() < 0.1,
            "what a round takes besides sending is made up for in it"
        );
    }

    #[test]
    fn without_a_measured_bandwidth_only_an_empty_rest_has_a_prediction() {
        assert_eq!(predicted(&history(&[round_in(0, 1, 0)]), &NOTHING), Duration::ZERO);
        assert!(predicted(&history(&[round_in(0, 1, 1)]), &NOTHING) > Duration::from_secs(1 << 29));
        assert_eq!(Downtime::predicted(&history(&[]), &NOTHING, &HandoverCost::default(), None), None);
    }
}

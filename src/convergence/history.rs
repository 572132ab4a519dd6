use std::time::Duration;

use super::curve::DirtySample;
use super::diverging::{Futile, Why};
use super::round::{Round, guest_seconds, rate};
use super::write_shares::WriteShares;

/// What a guest wrote in a short time between two rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// How many rounds preceded it.
    pub(super) after_rounds: usize,
    pub(super) sample: DirtySample,
    /// How far the guest was slowed meanwhile, in percent.
    throttle_percent: u8,
}

/// The throttle in force.
#[derive(Clone, Copy, Debug)]
struct Throttle {
    /// The first round under any throttle since the guest last ran at full speed.
    since: usize,
    /// What a round was to leave dirty, in bytes.
    expected_bytes: f64,
}

/// A throttle is futile if rounds leave this many times what was predicted.
const MISSED: f64 = 1.5;

impl Look {
    /// How long the guest ran meanwhile, in seconds.
    pub(super) fn guest_seconds(&self) -> f64 {
        guest_seconds(self.sample.interval, self.throttle_percent)
    }
}

/// The longest time to wake up the threads of both ends, where nothing else keeps the processors busy.
const WAKES_UP: Duration = Duration::from_millis(1);

/// The rounds so far and the measures taken: the basis of every decision.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The round trip of a message before the first round.
    round_trip: Duration,
    /// The duration of a harvest before the first round, if one was made.
    first_harvest: Option<Duration>,
    /// The shortest time between two rounds.
    between: Option<Duration>,
    rounds: Vec<Round>,
    /// How far the guest is slowed now, in percent.
    throttle_percent: u8,
    pub(super) throttle_refused: bool,
    /// The throttle in force, if any.
    throttle: Option<Throttle>,
    /// The throttle that was taken back because it had no effect.
    futile: Option<Futile>,
    looks: Vec<Look>,
    /// How the guest's writes are spread over its vCPUs, if each can be limited by itself.
    write_shares: Option<WriteShares>,
    /// Whether the log cannot show what is written in a short time.
    cannot_look: bool,
    /// The downtime allowed now, if it was relaxed.
    relaxed: Option<Duration>,
    /// The first round since the guest was last slowed or the bandwidth limit changed, or the first at all.
    regime: usize,
    /// The first round sent entirely under the present bandwidth limit.
    link_since: usize,
    /// Consecutive rounds that did not bring the switch nearer, since the last measure.
    pub(super) stuck_rounds: u32,
    /// Whether a round is being sent.
    in_round: bool,
    /// Whether the reason was a limit that is too low, which does not depend on the guest.
    limit_too_low: bool,
}

impl History {
    /// A history without rounds, on a link with this round trip of a message.
    #[must_use]
    pub fn new(round_trip: Duration) -> Self {
        Self { round_trip, ..Self::default() }
    }

    /// Records the duration of a harvest before the first round.
    pub fn harvested(&mut self, took: Duration) {
        self.first_harvest = Some(took);
    }

    /// A round began so long after the one before had been sent.
    pub fn began_after(&mut self, between: Duration) {
        self.between = Some(self.between.map_or(between, |least| least.min(between)));
    }

    /// A round begins: what is changed until it is [added](Self::push) counts from the next one on.
    pub fn begins_round(&mut self) {
        self.in_round = true;
    }

    /// The first round that is sent entirely after now.
    fn next_round(&self) -> usize {
        self.rounds.len() + usize::from(self.in_round)
    }

    /// Adds a round.
    pub fn push(&mut self, round: Round) {
        self.in_round = false;
        self.rounds.push(round);
    }

    /// So many of the pages that the last round left wait: the next leaves them out.
    pub fn waits(&mut self, pages: u64) {
        if let Some(last) = self.rounds.last_mut() {
            last.waiting_pages = pages;
        }
    }

    /// So many percent of the pages that the guest wrote in the last round, it had written in the one before.
    pub fn rewrote(&mut self, percent: Option<u8>) {
        if let Some(last) = self.rounds.last_mut() {
            last.rewritten_percent = percent;
        }
    }

    /// Records why the last round did not bring the switch nearer, if it did not.
    pub fn judged(&mut self, diverging: Option<Why>) {
        let limit_too_low = diverging == Some(Why::LimitTooLow);
        let before = if limit_too_low == self.limit_too_low { self.stuck_rounds } else { 0 };
        self.stuck_rounds = if diverging.is_some() { before + 1 } else { 0 };
        self.limit_too_low = limit_too_low;
    }

    /// Records how much of the guest's time recording its writes took in the last round.
    pub fn tracked(&mut self, lost: Option<Duration>) {
        if let Some(last) = self.rounds.last_mut() {
            last.tracking = lost;
        }
    }

    /// Records how the guest's writes at full speed are spread over its vCPUs, if each can be limited.
    pub fn writes_are_spread(&mut self, shares: Option<WriteShares>) {
        self.write_shares = shares;
    }

    /// The share of its time that the guest loses by throttling, as predicted.
    #[must_use]
    pub fn throttled_share(&self) -> f64 {
        let running = f64::from(100 - self.throttle_percent.min(99)) / 100.0;
        self.write_shares.as_ref().map_or(1.0 - running, |shares| shares.lost(running))
    }

    /// How the guest's writes are spread over its vCPUs, if each can be limited by itself.
    #[must_use]
    pub fn write_shares(&self) -> Option<&WriteShares> {
        self.write_shares.as_ref()
    }

    /// Records by how many percent the writing vCPUs were slowed in the last round, and how much of its time
    /// the guest lost by that.
    pub fn slowed(&mut self, percent: u8, lost: Duration) {
        if let Some(last) = self.rounds.last_mut() {
            (last.throttle_percent, last.throttling) = (percent, Some(lost));
        }
    }

    /// Records what the guest wrote in a short time after the last round.
    pub fn looked(&mut self, sample: DirtySample) {
        let (after_rounds, throttle_percent) = (self.rounds.len(), self.throttle_percent);
        self.looks.push(Look { after_rounds, sample, throttle_percent });
    }

    /// The log cannot show what is written in a short time.
    pub fn cannot_look(&mut self) {
        self.cannot_look = true;
    }

    /// The guest is slowed by this much from now on, after which a round is expected to leave so many bytes.
    pub fn throttled(&mut self, percent: u8, expected_bytes: f64) {
        let since = self.throttle.map_or(self.next_round(), |throttle| throttle.since);
        if percent == 0 {
            self.futile = self.futile_throttle().or(self.futile);
        }
        self.throttle = (percent > 0).then_some(Throttle { since, expected_bytes });
        self.throttle_percent = percent;
        self.regime = self.next_round();
        self.stuck_rounds = 0;
    }

    /// The VMM cannot slow the guest further.
    pub fn throttle_refused(&mut self) {
        self.throttle_refused = true;
    }

    /// This much downtime is allowed from now on.
    pub fn relaxed_to(&mut self, downtime: Duration) {
        self.relaxed = Some(downtime);
        self.stuck_rounds = 0;
    }

    /// The operator has changed the limits: a relaxed downtime and verdicts by the old limits are void. If
    /// the bandwidth limit has changed, the rounds so far show neither the bandwidth nor how rounds shrink.
    pub fn limits_changed(&mut self, bandwidth_too: bool) {
        self.relaxed = None;
        self.futile = None;
        self.stuck_rounds = 0;
        if bandwidth_too {
            self.regime = self.next_round();
            self.link_since = self.next_round();
        }
    }

    /// The throttle in force, if two rounds under it left much more than was predicted.
    #[must_use]
    pub fn futile_throttle(&self) -> Option<Futile> {
        let throttle = self.throttle?;
        let last_two = self.rounds.get(self.regime..)?.last_chunk::<2>()?;
        let missed = |round: &Round| {
            #[expect(clippy::cast_precision_loss, reason = "a comparison")]
            let bytes = round.dirty_bytes() as f64;
            bytes > MISSED * throttle.expected_bytes
        };
        let rounds = u32::try_from(self.rounds.len() - throttle.since).unwrap_or(u32::MAX);
        let throttle_percent = self.throttle_percent;
        last_two.iter().all(missed).then_some(Futile { throttle_percent, rounds })
    }

    /// The throttle that was taken back because it had no effect, if any was.
    #[must_use]
    pub fn futile(&self) -> Option<Futile> {
        self.futile
    }

    pub(super) fn looks(&self) -> &[Look] {
        &self.looks
    }

    /// The looks since the last round; `None` if no look is possible.
    pub(super) fn looks_since_round(&self) -> Option<&[Look]> {
        let since = self.looks.iter().rposition(|look| look.after_rounds < self.rounds.len());
        (!self.cannot_look).then(|| &self.looks[since.map_or(0, |index| index + 1)..])
    }

    /// The rounds so far.
    #[must_use]
    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    /// How far the guest is slowed now, in percent.
    #[must_use]
    pub fn throttle_percent(&self) -> u8 {
        self.throttle_percent
    }

    /// The relaxed downtime since the limits were last changed, if any.
    #[must_use]
    pub fn relaxed(&self) -> Option<Duration> {
        self.relaxed
    }

    /// Bytes a second on the wire while lanes were sending, over the latest rounds that were long enough to
    /// measure, or over all if none was. Destinations are slower while their memory is fresh, so a first
    /// round counts only if no other does, or if the others were no faster. The same applies to rounds under
    /// an earlier bandwidth limit.
    ///
    /// `None` as long as nothing was sent.
    #[must_use]
    pub fn bandwidth(&self) -> Option<f64> {
        let now = self.rounds.get(self.link_since..).unwrap_or_default();
        let first_is_old = self.link_since > 0;
        if first_is_old && let Some(bandwidth) = Self::bandwidth_of(now, &[]) {
            return Some(bandwidth);
        }
        let (first, later) = self.rounds.split_at_checked(1)?;
        Self::bandwidth_of(later, first)
    }

    /// Bandwidth over these rounds, or over `first` if none counts.
    fn bandwidth_of(rounds: &[Round], first: &[Round]) -> Option<f64> {
        const TELLING: Duration = Duration::from_millis(10);
        let over = |rounds: &mut dyn Iterator<Item = &Round>| {
            let (bytes, time) = rounds.fold((0, Duration::ZERO), |(bytes, time), round| {
                (bytes + round.sent_bytes(), time + round.busy())
            });
            rate(bytes, time)
        };
        let telling = |round: &&Round| round.busy() >= TELLING && round.sent_bytes() > 0;
        over(&mut rounds.iter().rev().filter(telling).take(3))
            // In a short round the fence dominates, so its bandwidth is too low rather than too high.
            .or_else(|| {
                let first = over(&mut first.iter().filter(telling))?;
                Some(over(&mut rounds.iter()).map_or(first, |short| short.max(first)))
            })
            .or_else(|| over(&mut first.iter().chain(rounds)))
    }

    /// How long a message and its answer take: as before the first round, or as the fastest fence since.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        let fences = self.rounds.iter().flat_map(|round| &round.lanes).map(|lane| lane.fence);
        fences.min().map_or(self.round_trip, |quickest| quickest.min(self.round_trip))
    }

    /// How long a message and its answer take between the threads that make the switch.
    ///
    /// That is longer than a fence where a lane's hardware or its busy threads answer a fence, because a
    /// message wakes up threads at both ends. The greeting, which was measured once, woke them up too. Where
    /// other processes delayed it, a fence and [`WAKES_UP`] are the better estimate.
    #[must_use]
    pub(super) fn answer(&self) -> Duration {
        self.round_trip.min(self.round_trip() + WAKES_UP)
    }

    /// What a round takes besides sending: the least so far, because the guest's vCPUs compete for the same
    /// processors. The first round does not count, because it reads all of RAM and finds memory unregistered.
    #[must_use]
    pub fn overhead(&self) -> Duration {
        self.rounds.iter().skip(1).map(|round| round.overhead).min().unwrap_or_default()
    }

    /// How long nothing is sent between two rounds: the shortest time so far, and at least the last harvest.
    #[must_use]
    pub(super) fn between_rounds(&self) -> Duration {
        let harvest = self.rounds.last().map_or(Duration::ZERO, |round| round.harvest);
        self.between.unwrap_or_default().max(harvest)
    }

    /// How late the last bytes of a round leave by the bandwidth limit: the median.
    #[must_use]
    pub(super) fn late(&self) -> Duration {
        let mut all: Vec<_> = self.rounds.iter().map(|round| round.late).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    /// How long a harvest takes while the guest is paused: as the fastest so far. While the guest runs, its
    /// vCPUs compete for the same locks and processors.
    #[must_use]
    pub fn harvest(&self) -> Duration {
        let all = self.first_harvest.into_iter().chain(self.rounds.iter().map(|round| round.harvest));
        all.min().unwrap_or_default()
    }

    /// What a round leaves for the next to send, as a share of what the round before left: below 1 if rounds
    /// get smaller. The mean of the last two rounds where both ran at the same throttle and bandwidth limit;
    /// `None` before the second round.
    #[must_use]
    pub fn shrink(&self) -> Option<f64> {
        let dirty = |back: usize| {
            let index = self.rounds.len().checked_sub(back + 1)?;
            #[expect(clippy::cast_precision_loss, reason = "a share")]
            Some(self.rounds[index].next_pages().max(1) as f64)
        };
        // The first round sends all of RAM, so shares begin with what it leaves.
        let share = dirty(0)? / dirty(1)?;
        let same_regime = self.rounds.len() >= self.regime + 2;
        match dirty(2) {
            Some(before) if same_regime => Some((dirty(0)? / before).sqrt()),
            _ => Some(share),
        }
    }

    /// Bytes of new pages that the guest would write each second at full speed, judged by the last round.
    #[must_use]
    pub fn dirty_rate_unthrottled(&self) -> f64 {
        let running_percent = 100 - self.throttle_percent.min(99);
        self.rounds.last().map_or(0.0, Round::dirty_rate) * 100.0 / f64::from(running_percent)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::round::LaneLoad;
    use super::*;
    use crate::memory::PAGE_BYTES;

    pub(in crate::convergence) const MIB: u64 = 1 << 20;

    /// A round of one lane that sent at 1 MiB a millisecond.
    pub(in crate::convergence) fn round(sent_mib: u64, dirty_mib: u64) -> Round {
        round_in(sent_mib, sent_mib, dirty_mib)
    }

    pub(in crate::convergence) fn round_in(sent_mib: u64, millis: u64, dirty_mib: u64) -> Round {
        let busy = Duration::from_millis(millis);
        let lane = LaneLoad { bytes: sent_mib * MIB, busy, fence: Duration::ZERO };
        let dirty_pages = dirty_mib * MIB / PAGE_BYTES;
        Round { lanes: vec![lane], duration: busy, dirty_pages, ..Round::default() }
    }

    pub(in crate::convergence) fn history(rounds: &[Round]) -> History {
        History { rounds: rounds.to_vec(), ..History::default() }
    }

    fn mib_per_ms(bandwidth: Option<f64>) -> f64 {
        bandwidth.unwrap() / 1e3 / 1_048_576.0
    }

    #[test]
    fn bandwidth_is_that_of_the_latest_rounds_that_were_long_enough() {
        let rounds = [
            round_in(1000, 1000, 0),
            round_in(10, 100, 0),
            round_in(10, 100, 0),
            round_in(10, 100, 0),
            round_in(1, 1, 0),
        ];
        assert!((mib_per_ms(history(&rounds).bandwidth()) - 0.1).abs() < 0.001);
        assert!((mib_per_ms(history(&rounds[..2]).bandwidth()) - 0.1).abs() < 0.001, "the first is no guide");
        assert!((mib_per_ms(history(&rounds[..1]).bandwidth()) - 1.0).abs() < 0.001, "but better than none");
        let short = [round_in(1000, 1000, 0), round_in(8, 4, 0), round_in(0, 1, 0)];
        assert!(
            (mib_per_ms(history(&short).bandwidth()) - 1.6).abs() < 0.001,
            "short rounds tell too little"
        );
        let empty = [round_in(1000, 1000, 0), round_in(1, 4, 0)];
        assert!((mib_per_ms(history(&empty).bandwidth()) - 1.0).abs() < 0.001);
        assert_eq!(history(&[]).bandwidth(), None);
        assert_eq!(history(&[round_in(0, 5, 0)]).bandwidth(), None);
    }

    #[test]
    fn time_in_which_a_lane_could_not_send_is_no_time_of_the_link() {
        let lane = LaneLoad { bytes: 100 * MIB, busy: Duration::from_millis(50), fence: Duration::ZERO };
        let round = Round { lanes: vec![lane; 2], duration: Duration::from_secs(9), ..Round::default() };
        // Two lanes at once.
        assert!((mib_per_ms(history(&[round]).bandwidth()) - 4.0).abs() < 0.001);
    }

    #[test]
    fn a_rounds_overhead_is_the_least_of_those_after_the_first() {
        let with = |millis| Round { overhead: Duration::from_millis(millis), ..round(1, 1) };
        let overhead = |millis: &[u64]| {
            history(&millis.iter().map(|&millis| with(millis)).collect::<Vec<_>>()).overhead().as_millis()
        };
        assert_eq!((overhead(&[]), overhead(&[1]), overhead(&[1, 7]), overhead(&[1, 7, 5, 9])), (0, 0, 7, 5));
    }

    #[test]
    fn between_rounds_is_the_shortest_time_and_no_less_than_a_harvest() {
        let ms = Duration::from_millis;
        let mut history = history(&[Round { harvest: ms(2), ..round(1, 1) }]);
        assert_eq!(history.between_rounds(), ms(2));
        for (between, least) in [(9, 9), (5, 5), (7, 5), (1, 2)] {
            history.began_after(ms(between));
            assert_eq!(history.between_rounds(), ms(least));
        }
    }

    #[test]
    fn how_rounds_shrink_is_told_from_the_second_on_and_anew_once_the_guest_is_slowed() {
        let rounds = [round(1000, 800), round(800, 400), round(400, 300)];
        assert_eq!(history(&rounds[..1]).shrink(), None);
        assert_eq!(history(&rounds[..2]).shrink(), Some(0.5));
        assert_eq!(history(&rounds).shrink(), Some((3.0f64 / 8.0).sqrt()));
        let mut slowed = history(&rounds[..2]);
        slowed.throttled(50, 0.0);
        slowed.push(round(400, 300));
        assert_eq!(slowed.shrink(), Some(0.75));
        slowed.push(round(300, 100));
        assert_eq!(slowed.shrink(), Some(0.5));
    }

    #[test]
    fn a_slowed_guest_would_write_more_at_full_speed() {
        let mut history = history(&[round(1000, 100)]);
        let measured = history.dirty_rate_unthrottled();
        history.throttled(75, 0.0);
        assert!((history.dirty_rate_unthrottled() / measured - 4.0).abs() < 1e-9);
    }

    #[test]
    fn rounds_under_another_bandwidth_limit_tell_nothing_once_there_are_others() {
        let mut history = history(&[round(1000, 100), round(100, 100), round(100, 90)]);
        assert_eq!(history.shrink(), Some(0.9f64.sqrt()));
        history.limits_changed(false);
        assert_eq!(history.shrink(), Some(0.9f64.sqrt()), "the link is the same");
        history.limits_changed(true);
        assert!((mib_per_ms(history.bandwidth()) - 1.0).abs() < 0.001, "for want of another");
        history.push(round_in(2, 4, 1));
        assert!((mib_per_ms(history.bandwidth()) - 0.5).abs() < 0.001, "short, but all there is");
        history.push(round_in(10, 50, 1));
        assert!((mib_per_ms(history.bandwidth()) - 0.2).abs() < 0.001);
        assert_eq!(history.shrink(), Some((1.0f64 / 90.0).sqrt()));
    }
}

use super::history::History;
use super::round::Round;

/// What a guest writes, as its rounds and looks have shown: bytes of different pages by the guest's time.
///
/// A page that is written twice counts once, so the curve gets flatter. Where it is flat, the guest writes a
/// *hot set* over and over, and a round tells the size of that set but not how fast it is written. Between
/// two measurements the curve is a power of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Writes {
    /// Seconds of the guest's time and bytes: both ascend, bytes no faster than seconds.
    points: Vec<Point>,
    /// All that the guest can write: what it ever touched.
    most: f64,
    /// The power of time below the first point.
    low_power: f64,
    /// The share of the pages that each round writes again, where no look shows more.
    rewritten_share: f64,
    /// Whether it is the highest curve through the points, not a likely one.
    is_cautious: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    seconds: f64,
    bytes: f64,
    /// How many measurements it is the mean of.
    weight: f64,
}

/// How many rounds back a measurement counts: a guest changes.
const ROUNDS_BACK: usize = 6;

/// A curve that rises by less than this power of time is flat.
const FLAT_POWER: f64 = 0.15;

/// Two measurements tell how the curve rises if their times differ by this factor.
const TIMES_DIFFER: f64 = 1.3;

impl Writes {
    /// What the rounds and looks of `history` show; `None` before the first round.
    #[must_use]
    pub fn of(history: &History) -> Option<Self> {
        let rounds = history.rounds();
        let first = rounds.first()?;
        let recent = &rounds[rounds.len().saturating_sub(ROUNDS_BACK)..];
        let since = rounds.len() - recent.len();
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let of_rounds = recent.iter().map(|round| (round.guest_seconds(), round.written_bytes() as f64));
        let looks = history.looks().iter().filter(|look| look.after_rounds >= since);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let of_looks = looks.map(|look| (look.guest_seconds(), look.sample.dirty_bytes as f64));
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let most = rounds.iter().map(Round::dirty_bytes).chain([first.sent_bytes()]).max()? as f64;
        let mut writes = Self::through(of_rounds.chain(of_looks), most);
        // A throttle shows more than rounds at full speed after it.
        let slowest = recent.iter().map(|round| round.throttle_percent).max()?;
        if let Some(share) = history.rewritten_share()
            && rounds.last()?.throttle_percent == slowest
        {
            writes.rewritten_share = share;
            writes.low_power = f64::midpoint(1.0, writes.first_power());
        }
        Some(writes)
    }

    fn through(measured: impl Iterator<Item = (f64, f64)>, most: f64) -> Self {
        let mut sorted: Vec<_> = measured
            .filter(|&(seconds, _)| seconds > 0.0)
            .map(|(seconds, bytes)| Point { seconds, bytes: bytes.max(1.0), weight: 1.0 })
            .collect();
        sorted.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        let mut points: Vec<Point> = Vec::new();
        for point in sorted {
            points.push(point);
            // A guest that goes on as before writes more in a longer time ...
            while let [.., low, high] = points[..]
                && (high.bytes < low.bytes || high.seconds < low.seconds * 1.02)
            {
                points.truncate(points.len() - 2);
                points.push(low.joined(high));
            }
        }
        // ... and no more than in proportion. If it did, it was kept from writing in the shorter time.
        for index in (1..points.len()).rev() {
            let high = points[index];
            let low = &mut points[index - 1];
            low.bytes = low.bytes.max(high.bytes * low.seconds / high.seconds);
        }
        let mut writes = Self { points, most, low_power: 1.0, rewritten_share: 0.0, is_cautious: false };
        // A curve that rises ever more steeply towards zero.
        writes.low_power = f64::midpoint(1.0, writes.first_power());
        writes
    }

    /// The highest curve through the same points, for advice that has to hold. Below the shortest measured
    /// time it falls no more steeply than above that time.
    #[must_use]
    pub fn cautious(&self) -> Self {
        Self { low_power: self.first_power(), is_cautious: true, ..self.clone() }
    }

    /// Bytes of the pages that the guest writes in so many seconds of its time.
    #[must_use]
    pub fn bytes_in(&self, seconds: f64) -> f64 {
        let Some((first, last)) = self.points.first().zip(self.points.last()) else { return 0.0 };
        if seconds <= 0.0 {
            return 0.0;
        }
        let bytes = if seconds <= first.seconds {
            first.bytes * (seconds / first.seconds).powf(self.low_power)
        } else if let Some(pair) = self.points.windows(2).find(|pair| seconds <= pair[1].seconds) {
            let [low, high] = [pair[0], pair[1]];
            let most = (low.bytes * seconds / low.seconds).min(high.bytes);
            if self.is_cautious { most } else { low.bytes * (seconds / low.seconds).powf(power(low, high)) }
        } else {
            let rising = match self.points[..] {
                [.., before, last] => power(before, last),
                _ => self.first_power(),
            };
            last.bytes * (seconds / last.seconds).powf(rising)
        };
        bytes.min(self.most)
    }

    /// Whether even the shortest measurement found the whole hot set written: nothing shows how fast it is
    /// written, except that it takes no longer than that.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        self.points.first().is_some_and(|first| first.bytes > 1.0) && self.first_power() < FLAT_POWER
    }

    /// Bytes a second that the guest writes, each page counted as often as it is written as far as that is
    /// visible; at least this many if it [is saturated](Self::is_saturated).
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.points.first().map_or(0.0, |first| first.bytes / first.seconds)
    }

    /// The power of time at the shortest measurements. Pages that are written in each round are written in
    /// any time as long as one.
    fn first_power(&self) -> f64 {
        self.measured_power().min(1.0 - self.rewritten_share)
    }

    fn measured_power(&self) -> f64 {
        match self.points[..] {
            [first, second, ..] if second.seconds >= first.seconds * TIMES_DIFFER => power(first, second),
            [first, _, third, ..] if third.seconds >= first.seconds * TIMES_DIFFER => power(first, third),
            // All that was ever touched.
            [first, ..] if first.bytes >= 0.97 * self.most => 0.0,
            _ => 1.0,
        }
    }
}

impl Point {
    fn joined(self, other: Self) -> Self {
        let weight = self.weight + other.weight;
        let mean = |one: f64, two: f64| ((one.ln() * self.weight + two.ln() * other.weight) / weight).exp();
        Self { seconds: mean(self.seconds, other.seconds), bytes: mean(self.bytes, other.bytes), weight }
    }
}

/// The power of time by which the curve rises between two points.
fn power(low: Point, high: Point) -> f64 {
    ((high.bytes / low.bytes).ln() / (high.seconds / low.seconds).ln()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::curve::DirtySample;
    use super::super::history::tests::{MIB, round_in};
    use super::*;

    fn writes(points: &[(f64, f64)], most: f64) -> Writes {
        Writes::through(points.iter().copied(), most)
    }

    fn history(rounds: &[Round]) -> History {
        let mut history = History::default();
        rounds.iter().for_each(|round| history.push(round.clone()));
        history
    }

    #[test]
    fn a_guest_that_writes_its_hot_set_in_each_round_is_saturated_at_a_speed_that_is_a_lower_bound() {
        // 256 MiB in 2.4 s, then 64 MiB in 0.6 s, again and again.
        let hot = history(&[round_in(256, 2400, 64), round_in(64, 600, 64), round_in(64, 600, 64)]);
        let writes = Writes::of(&hot).unwrap();
        assert!(writes.is_saturated());
        assert!((writes.rate() / (64.0 * 1_048_576.0 / 0.6) - 1.0).abs() < 0.01, "{}", writes.rate());
        let slower = history(&[round_in(256, 2400, 200), round_in(200, 2000, 170), round_in(170, 1500, 130)]);
        assert!(!Writes::of(&slower).unwrap().is_saturated());
        let all = history(&[round_in(64, 600, 64), round_in(64, 600, 64)]);
        assert!(Writes::of(&all).unwrap().is_saturated(), "all that was ever touched");
    }

    #[test]
    fn a_look_shows_the_speed_that_rounds_cannot() {
        let mut hot = history(&[round_in(256, 2400, 64), round_in(64, 600, 64)]);
        hot.looked(DirtySample { interval: Duration::from_millis(20), dirty_bytes: 16 * MIB });
        let writes = Writes::of(&hot).unwrap();
        assert!(!writes.is_saturated());
        assert!((writes.bytes_in(0.01) / (8.0 * 1_048_576.0) - 1.0).abs() < 0.3, "{}", writes.bytes_in(0.01));
        assert!((writes.bytes_in(1.0) / (64.0 * 1_048_576.0) - 1.0).abs() < 0.05, "{}", writes.bytes_in(1.0));
    }

    #[test]
    fn a_guest_that_writes_the_same_pages_in_rounds_as_long_as_each_other_is_saturated() {
        let named =
            |percent, millis, mib| Round { rewritten_percent: Some(percent), ..round_in(mib, millis, mib) };
        let of = |percent| {
            let first = round_in(512, 5000, 80);
            let rounds = [(800, 105), (700, 100), (780, 96), (750, 101), (730, 99), (710, 102), (790, 98)];
            let later = rounds.map(|(millis, mib)| named(percent, millis, mib));
            Writes::of(&history(&[&[first], &later[..]].concat())).unwrap()
        };
        assert!(of(97).is_saturated());
        assert!(of(97).cautious().bytes_in(0.3) > 95.0 * 1_048_576.0, "{:?}", of(97));
        assert!(!of(40).is_saturated());
        let mut slowed = history(&[round_in(512, 5000, 100), named(99, 700, 100), named(99, 700, 100)]);
        slowed.push(Round { throttle_percent: 90, ..named(99, 700, 30) });
        slowed.push(named(99, 700, 100));
        assert!(!Writes::of(&slowed).unwrap().is_saturated(), "the throttle has shown how fast it writes");
    }

    #[test]
    fn a_look_at_a_guest_that_had_no_processor_meanwhile_does_not_hide_what_it_writes() {
        let mut hot = history(&[round_in(256, 2400, 64), round_in(64, 600, 64)]);
        hot.looked(DirtySample { interval: Duration::from_millis(30), dirty_bytes: MIB });
        let writes = Writes::of(&hot).unwrap();
        for writes in [writes.cautious(), writes] {
            assert!(writes.bytes_in(0.6) > 63.0 * 1_048_576.0, "{}", writes.bytes_in(0.6));
        }
    }

    #[test]
    fn a_slowed_guest_is_measured_by_its_own_time() {
        let slowed = Round { throttle_percent: 75, ..round_in(64, 400, 10) };
        let writes = Writes::of(&history(&[slowed])).unwrap();
        assert!((writes.bytes_in(0.1) / (10.0 * 1_048_576.0) - 1.0).abs() < 0.01);
    }

    proptest! {
        #[test]
        fn a_longer_time_never_has_less_written_nor_more_than_in_proportion(
            points in proptest::collection::vec((0.001f64..100.0, 1f64..1e9), 1..12),
            times in proptest::collection::vec(0.0001f64..1000.0, 2),
        ) {
            let writes = writes(&points, 1e9);
            let (short, long) = (times[0].min(times[1]), times[0].max(times[1]));
            for writes in [writes.cautious(), writes] {
                let (less, more) = (writes.bytes_in(short), writes.bytes_in(long));
                prop_assert!(less <= more * 1.000_001, "{less} {more}");
                prop_assert!(more / long <= less / short * 1.000_001, "{less} {more}");
                prop_assert!(more <= 1e9);
            }
        }
    }
}

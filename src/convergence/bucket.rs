use std::num::NonZeroU64;
use std::time::Duration;

/// Tells when the next bytes may leave, so that no more than a given number leave each second: a token
/// bucket, shared by all lanes.
///
/// It is kept as the *theoretical arrival time* of the generic cell rate algorithm (ITU-T I.371, annex A):
/// the moment at which all bytes admitted so far would have left at exactly the rate. A moment is a duration
/// since any fixed point.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    due: Duration,
}

impl Bucket {
    /// How far the sender may be ahead of the rate, so that a lane that overslept can catch up. Over a second
    /// that is a hundredth of the rate.
    pub(super) const AHEAD: Duration = Duration::from_millis(10);

    /// Takes `bytes` at `now`, and returns how long to wait before sending them.
    pub fn take(&mut self, now: Duration, bytes: u64, rate_per_second: NonZeroU64) -> Duration {
        let spent = u128::from(bytes) * 1_000_000_000 / u128::from(rate_per_second.get());
        let spent = Duration::from_nanos(u64::try_from(spent).unwrap_or(u64::MAX));
        // Unused rate of the past is lost, except for the small allowance ahead.
        let from = self.due.max(now.saturating_sub(Self::AHEAD));
        self.due = from.saturating_add(spent);
        from.saturating_sub(now)
    }

    /// How far the sender is behind the rate at `now`, as far as it may make up for that.
    #[must_use]
    pub fn behind(&self, now: Duration) -> Duration {
        now.saturating_sub(self.due).min(Self::AHEAD)
    }

    /// Forgets the bytes admitted at another rate.
    pub fn reset(&mut self) {
        self.due = Duration::ZERO;
    }

    /// The most bytes to take at once: what leaves in 2 ms, in whole pages. So no lane waits for long, a
    /// change of the rate takes effect soon, and the duration of a short round matches its bytes.
    #[must_use]
    pub fn portion_bytes(rate_per_second: NonZeroU64) -> u64 {
        (rate_per_second.get() / 500).max(1).next_multiple_of(4096)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The time after which all of `bytes` have left, sent in portions by a clock that oversleeps.
    fn send(bytes: u64, rate: NonZeroU64, portion: u64, oversleep: &[u64]) -> Duration {
        let (mut bucket, mut now, mut left) = (Bucket::default(), Duration::from_secs(5), bytes);
        let began = now;
        let mut oversleep = oversleep.iter().cycle();
        while left > 0 {
            let taken = portion.min(left);
            let wait = bucket.take(now, taken, rate);
            if !wait.is_zero() {
                now += wait + Duration::from_micros(*oversleep.next().unwrap());
            }
            left -= taken;
        }
        now - began
    }

    proptest! {
        #[test]
        fn no_more_leaves_than_the_rate_allows_and_hardly_less(
            megabytes_per_second in 1u64..10_000,
            portion_pages in 1u64..256,
            oversleep in proptest::collection::vec(0u64..2000, 1..8),
        ) {
            let rate = NonZeroU64::new(megabytes_per_second * 1_000_000).unwrap();
            // Two seconds' worth.
            let bytes = 2 * rate.get();
            let portion = (portion_pages * 4096).min(Bucket::portion_bytes(rate));
            let took = send(bytes, rate, portion, &oversleep).as_secs_f64();
            prop_assert!((1.97..2.03).contains(&took), "{took} s for 2 s' worth");
        }
    }

    #[test]
    fn time_in_which_nothing_was_sent_is_not_made_up_for() {
        let (mut bucket, rate) = (Bucket::default(), NonZeroU64::new(1_000_000).unwrap());
        let hour = Duration::from_secs(3600);
        assert_eq!(bucket.behind(hour), Bucket::AHEAD);
        assert_eq!(bucket.take(hour, 1_000_000, rate), Duration::ZERO);
        let wait = bucket.take(hour, 1, rate);
        assert_eq!(wait, Duration::from_secs(1) - Bucket::AHEAD);
        let due = hour + wait + Duration::from_micros(1);
        let behind = [0, 3, 30].map(|ms| bucket.behind(due + Duration::from_millis(ms)).as_millis());
        assert_eq!(behind, [0, 3, 10]);
    }

    #[test]
    fn a_debt_of_another_rate_is_forgotten() {
        let (mut bucket, slow) = (Bucket::default(), NonZeroU64::new(1).unwrap());
        bucket.take(Duration::ZERO, u64::MAX, slow);
        bucket.reset();
        assert_eq!(bucket.take(Duration::from_secs(1), 4096, slow), Duration::ZERO);
    }
}

use std::time::Duration;

/// How much a running guest wrote in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtySample {
    /// How long the guest was watched.
    pub interval: Duration,
    /// Bytes of the pages that it wrote meanwhile, each page counted once.
    pub dirty_bytes: u64,
}

/// Bytes of pages that a guest writes in a given time, from a few samples: a piecewise linear curve that
/// never falls.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtyCurve {
    /// Seconds and bytes, both ascending, from (0, 0).
    points: Vec<(f64, f64)>,
}

impl DirtyCurve {
    /// The curve through these samples. Of samples with the same interval the largest counts.
    #[must_use]
    pub fn new(samples: &[DirtySample]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by_key(|sample| (sample.interval, sample.dirty_bytes));
        let mut points = vec![(0.0, 0.0)];
        for DirtySample { interval, dirty_bytes } in sorted {
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let (seconds, bytes) = (interval.as_secs_f64(), dirty_bytes as f64);
            let (last_seconds, last_bytes) = points[points.len() - 1];
            if seconds > last_seconds {
                points.push((seconds, bytes.max(last_bytes)));
            } else if let [_, .., last] = &mut points[..] {
                last.1 = bytes.max(last_bytes);
            }
        }
        Self { points }
    }

    /// Bytes of the pages that the guest would write in `seconds`; after the last sample, at the rate between
    /// the last two.
    #[must_use]
    pub fn bytes_in(&self, seconds: f64) -> f64 {
        let Some(pair) =
            self.points.windows(2).find(|pair| seconds <= pair[1].0).or(self.points.windows(2).last())
        else {
            return 0.0;
        };
        let ((from, low), (to, high)) = (pair[0], pair[1]);
        low + (high - low) * (seconds - from) / (to - from)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_line_goes_through_the_samples_and_on() {
        let sample =
            |millis, dirty_bytes| DirtySample { interval: Duration::from_millis(millis), dirty_bytes };
        let curve =
            DirtyCurve::new(&[sample(2000, 150), sample(1000, 100), sample(1000, 90), sample(3000, 140)]);
        for (seconds, bytes) in
            [(0.0, 0.0), (0.5, 50.0), (1.0, 100.0), (1.5, 125.0), (2.5, 150.0), (9.0, 150.0)]
        {
            assert_eq!(curve.bytes_in(seconds), bytes, "{seconds}");
        }
        assert_eq!(DirtyCurve::new(&[sample(1000, 100)]).bytes_in(7.0), 700.0);
        assert_eq!(DirtyCurve::default().bytes_in(1.0), 0.0);
        assert_eq!(DirtyCurve::new(&[]).bytes_in(1.0), 0.0);
    }

    proptest! {
        #[test]
        fn a_line_never_falls(
            samples in proptest::collection::vec((0u64..10_000, 0u64..10_000), 0..6),
            seconds in proptest::collection::vec(0f64..100.0, 2),
        ) {
            let sample = |(millis, megabytes)| DirtySample {
                interval: Duration::from_millis(millis),
                dirty_bytes: megabytes * 1_000_000,
            };
            let curve = DirtyCurve::new(&samples.into_iter().map(sample).collect::<Vec<_>>());
            let (early, late) = (seconds[0].min(seconds[1]), seconds[0].max(seconds[1]));
            prop_assert!(curve.bytes_in(early) <= curve.bytes_in(late) + 1e-3);
            prop_assert!(curve.bytes_in(early) >= 0.0);
        }
    }
}

//! Statistics of repeated measurements.

/// The distribution of repeated values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` without values, or if one is not a number.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        };
        Some(Self { median, min: sorted[0], max: sorted[sorted.len() - 1] })
    }

    /// The difference between the greatest and the least, as a share of the median.
    pub(crate) fn drift(self) -> f64 {
        (self.max - self.min) / self.median
    }
}

/// The nearest rank: `percent` of a hundred values are at most this. `None` without values.
pub(crate) fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middles() {
        let median = |values: &[f64]| Spread::of(values).map(|spread| spread.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
    }

    #[test]
    fn nothing_is_made_of_nothing_or_of_no_numbers() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[f64::INFINITY]), None);
    }

    #[test]
    fn drift_is_the_whole_spread() {
        let drift = Spread::of(&[100.0, 95.0, 105.0]).unwrap().drift();
        assert!((drift - 0.1).abs() < 1e-9, "{drift}");
        assert!(Spread::of(&[5.0]).unwrap().drift() < 1e-9);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values = [4.0, 1.0, 3.0, 2.0];
        let expected = [(0, 1.0), (25, 1.0), (26, 2.0), (50, 2.0), (90, 4.0), (100, 4.0)];
        for (percent, value) in expected {
            assert_eq!(percentile(&values, percent), Some(value), "{percent}");
        }
        assert_eq!(percentile(&[], 50), None);
    }
}

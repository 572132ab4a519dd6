/// How a guest's writes at full speed are spread over its vCPUs.
///
/// A quota for each vCPU limits those that write most, and leaves the others alone.
#[derive(Clone, Debug, PartialEq)]
pub struct WriteShares {
    /// The share of each vCPU, the largest first. They add up to 1.
    shares: Vec<f64>,
}

impl WriteShares {
    /// The shares of vCPUs that wrote so many pages; as if all wrote the same if none wrote any.
    #[must_use]
    pub fn of(pages: &[u64]) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let mut shares: Vec<_> = pages.iter().map(|&pages| pages as f64).collect();
        shares.sort_by(|one, other| other.total_cmp(one));
        let total: f64 = shares.iter().sum();
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let even = 1.0 / shares.len().max(1) as f64;
        shares.iter_mut().for_each(|share| *share = if total > 0.0 { *share / total } else { even });
        Self { shares }
    }

    /// What each vCPU may write at the most, as a share of what all write at full speed, so that all together
    /// write this share.
    #[must_use]
    pub fn quota(&self, of_all: f64) -> f64 {
        let (mut left, mut vcpus) = (of_all.clamp(0.0, 1.0), self.shares.len());
        // Those that write least have all that they want, and the rest is the others'.
        for &share in self.shares.iter().rev() {
            #[expect(clippy::cast_precision_loss, reason = "at most some thousands")]
            let each = left / vcpus as f64;
            if share >= each {
                return each;
            }
            left -= share;
            vcpus -= 1;
        }
        self.shares.first().copied().unwrap_or(1.0)
    }

    /// The share of its time that the guest loses, on average over its vCPUs, if all together write this
    /// share.
    #[must_use]
    pub fn lost(&self, of_all: f64) -> f64 {
        let quota = self.quota(of_all);
        let stands = |&share: &f64| if share > quota { 1.0 - quota / share } else { 0.0 };
        #[expect(clippy::cast_precision_loss, reason = "at most some thousands")]
        let vcpus = self.shares.len().max(1) as f64;
        self.shares.iter().map(stands).sum::<f64>() / vcpus
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_vcpu_of_four_that_writes_loses_what_all_four_would() {
        let one = WriteShares::of(&[0, 1000, 0, 0]);
        assert!((one.quota(0.2) - 0.2).abs() < 1e-9);
        assert!((one.lost(0.2) - 0.8 / 4.0).abs() < 1e-9);
        let all = WriteShares::of(&[1000; 4]);
        assert!((all.quota(0.2) - 0.05).abs() < 1e-9);
        assert!((all.lost(0.2) - 0.8).abs() < 1e-9);
        let unknown = WriteShares::of(&[0; 4]);
        assert_eq!(unknown, all);
    }

    #[test]
    fn a_vcpu_that_writes_little_is_left_alone() {
        let shares = WriteShares::of(&[10, 90]);
        assert!((shares.quota(0.5) - 0.4).abs() < 1e-9);
        assert!((shares.lost(0.5) - (1.0 - 4.0 / 9.0) / 2.0).abs() < 1e-9);
        assert_eq!(WriteShares::of(&[]).lost(0.5), 0.0);
    }

    proptest! {
        #[test]
        fn all_together_write_what_was_asked_and_lose_no_more_than_by_a_share_of_time(
            pages in proptest::collection::vec(0u64..1000, 1..9),
            of_all in 0f64..1.0,
        ) {
            let shares = WriteShares::of(&pages);
            let quota = shares.quota(of_all);
            let written: f64 = shares.shares.iter().map(|share| share.min(quota)).sum();
            prop_assert!((written - of_all).abs() < 1e-9, "{written} of {of_all}");
            prop_assert!(shares.lost(of_all) <= 1.0 - of_all + 1e-9);
        }
    }
}

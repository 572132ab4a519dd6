//! A guest under all policies.

use super::guest::Kind;
use super::world::Outcome;

/// One guest over one link, under all policies.
pub(super) struct Race {
    pub(super) kind: Kind,
    pub(super) optimum: Option<Outcome>,
    /// In the order of [`POLICIES`](super::policies::POLICIES).
    pub(super) outcomes: Vec<Outcome>,
}

impl Race {
    /// The time lost under a policy as a multiple of the optimum's, if both moved the guest.
    pub(super) fn lost_ratio(&self, policy: usize) -> Option<f64> {
        let (optimum, outcome) = (self.optimum?, self.outcomes[policy]);
        outcome.moved.then_some(outcome.lost / optimum.lost)
    }

    /// Whether another policy that kept the limits cost the guest less than the first one.
    pub(super) fn is_beaten(&self) -> bool {
        let [auto, others @ ..] = &self.outcomes[..] else { return false };
        let others = others.iter().filter(|other| other.moved && !other.broke_limit).map(|other| other.lost);
        let best = others.fold(f64::INFINITY, f64::min);
        let lost = if auto.moved { auto.lost } else { f64::INFINITY };
        lost > best * 1.1 + 0.002
    }
}

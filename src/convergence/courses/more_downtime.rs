//! To allow more downtime than the limit, now or after more rounds.

use std::time::Duration;

use crate::convergence::course::{Course, Offer, milliseconds};
use crate::convergence::next::Decision;
use crate::convergence::outlook::Outlook;

pub(super) struct MoreDowntime;

impl Course for MoreDowntime {
    fn offer(&self, ahead: &Outlook) -> Offer {
        // Slowed as it is for the rest of the rounds, or at full speed.
        let percents = [ahead.throttle_percent, 0];
        let best = |downtime: f64| {
            let ends =
                percents.iter().filter_map(|&percent| Some((percent, ahead.best(percent, 0, downtime)?)));
            ends.min_by(|(_, one), (_, other)| one.weight().total_cmp(&other.weight()))
        };
        let (within, any) = (best(ahead.bounds.downtime_max), best(f64::INFINITY));
        let is_open = within.is_some();
        let Some((percent, end)) = within.or(any) else {
            return Offer {
                what: "more downtime".to_owned(),
                step: Decision::GiveUp,
                end: None,
                closed: Some("no switch is within the other limits".to_owned()),
            };
        };
        let needed = Duration::from_secs_f64(end.needed());
        let step = match end.rounds {
            0 => Decision::Relax(needed),
            _ if percent < ahead.throttle_percent => Decision::Throttle(percent),
            _ => Decision::AnotherRound,
        };
        let most = milliseconds(Duration::from_secs_f64(ahead.bounds.downtime_max.min(1e9)));
        let closed = (!is_open).then(|| format!("no more than {most} may be allowed"));
        Offer { what: format!("to allow {} of downtime", milliseconds(needed)), step, end: Some(end), closed }
    }
}

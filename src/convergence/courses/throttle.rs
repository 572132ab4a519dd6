//! To slow the guest, or to slow it by another percentage: all of its vCPUs, or only the writes of those that
//! write most.

use crate::convergence::course::{Course, Offer};
use crate::convergence::next::Decision;
use crate::convergence::outlook::Outlook;

pub(super) struct Throttle;

impl Course for Throttle {
    fn offer(&self, ahead: &Outlook) -> Offer {
        let others =
            [0].into_iter().chain(ahead.throttles()).filter(|&other| other != ahead.throttle_percent);
        let ends =
            others.filter_map(|percent| Some((percent, ahead.best(percent, 1, ahead.bounds.downtime)?)));
        let best = ends.min_by(|(_, one), (_, other)| one.weight().total_cmp(&other.weight()));
        match best {
            Some((0, end)) => {
                let what = "more rounds at full speed".to_owned();
                Offer { what, step: Decision::Throttle(0), end: Some(end), closed: None }
            }
            Some((percent, end)) => {
                let what = match &ahead.write_shares {
                    Some(_) => format!(
                        "to limit the guest's writes to {:.1} MB/s, {percent} % less than at full speed",
                        ahead.write_limit(percent) / 1e6
                    ),
                    None => format!("to slow the guest by {percent} %"),
                };
                Offer { what, step: Decision::Throttle(percent), end: Some(end), closed: None }
            }
            None => {
                let most = ahead.bounds.throttle_max_percent;
                let closed = match ahead.throttles().next_back() {
                    None => "that is not allowed, or was tried in vain".to_owned(),
                    Some(_) => format!("even {most} % is not enough"),
                };
                let what = "to slow the guest".to_owned();
                Offer { what, step: Decision::Throttle(most), end: None, closed: Some(closed) }
            }
        }
    }
}

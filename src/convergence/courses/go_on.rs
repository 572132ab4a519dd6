//! More rounds, with the guest as it is.

use crate::convergence::course::{Course, Offer};
use crate::convergence::next::Decision;
use crate::convergence::outlook::Outlook;

pub(super) struct GoOn;

impl Course for GoOn {
    fn offer(&self, ahead: &Outlook) -> Offer {
        let (percent, step) = (ahead.throttle_percent, Decision::AnotherRound);
        let what = match percent {
            0 => "more rounds".to_owned(),
            _ if ahead.write_shares.is_some() => {
                format!("more rounds with the guest's writes slowed by {percent} %")
            }
            _ => format!("more rounds with the guest slowed by {percent} %"),
        };
        let end = ahead.best(percent, 1, ahead.bounds.downtime);
        let closed = end.is_none().then(|| "they do not come down to the limits".to_owned());
        Offer { what, step, end, closed }
    }
}

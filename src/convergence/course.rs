use std::fmt;
use std::time::Duration;

use super::next::Decision;
use super::outlook::{End, Outlook};

/// A way on from a round.
pub trait Course: Sync {
    /// What this course offers best.
    fn offer(&self, ahead: &Outlook) -> Offer;
}

/// What a course would do, and what that costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// What it does, in words.
    pub what: String,
    /// Its next step.
    pub step: Decision,
    /// The switch to which it leads, if it leads to one.
    pub end: Option<End>,
    /// Why it is not open, if it is not.
    pub closed: Option<String>,
}

impl Offer {
    /// The end, if the course is open.
    #[must_use]
    pub fn open(&self) -> Option<&End> {
        self.end.as_ref().filter(|_| self.closed.is_none())
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.what)?;
        if let Some(End { until_switch, lost, .. }) = &self.end {
            let [lost, downtime] = [lost.total(), lost.downtime].map(milliseconds);
            let seconds = until_switch.as_secs_f64();
            write!(formatter, " ({lost} lost, {downtime} of it downtime, switch in {seconds:.1} s)")?;
        }
        self.closed.as_ref().map_or(Ok(()), |why| write!(formatter, " ({why})"))
    }
}

pub(super) fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", (time.as_secs_f64() * 1e3).ceil())
}

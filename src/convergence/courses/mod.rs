//! The ways on from a round, each with what it would cost the guest. One more is a file here and a line in
//! [`ALL`].

mod go_on;
mod more_downtime;
mod throttle;

use super::course::Course;

/// All courses.
pub(super) const ALL: [&dyn Course; 3] = [&go_on::GoOn, &throttle::Throttle, &more_downtime::MoreDowntime];

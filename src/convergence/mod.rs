//! When to stop sending rounds, and what to do when they do not get smaller.
//!
//! Pure functions over measurements: no clock is read and nothing is sent. The model is the usual one. With
//! `b` bytes a second on the wire, pausing now costs the dirty bytes divided by `b`, plus the fixed cost of a
//! switch. A guest that writes `r` bytes a second of new pages leaves `r / b` of what a round sent, so rounds
//! get smaller if `r < b`.
//!
//! | file | |
//! |---|---|
//! | `limits` | what the operator asked for: [`Limits`], [`IfStuck`] |
//! | `history` | measured rounds: [`Round`], [`History`]; bandwidth, dirty rate, how rounds shrink |
//! | `writes` | what the guest writes in a given time: [`Writes`], with its hot set |
//! | `named` | what rounds show of a guest whose VMM names pages |
//! | `write_shares` | how its writes are spread over its vCPUs: [`WriteShares`] |
//! | `lost` | what a migration takes from the guest: [`Lost`], by cause |
//! | `lost_so_far` | the same of the rounds so far |
//! | `outlook` | rounds as they would go on: [`Outlook`] |
//! | `course`, `courses` | the ways on from a round and what each costs: [`Course`], [`Offer`] |
//! | `auto` | the choice among the courses |
//! | `prediction` | how long a switch would take now: [`Downtime`] as the sum of its parts |
//! | `next`, `decision` | what to do after a round: [`Decision`] |
//! | `decision/inside` | what to do inside a round that takes long: [`Inside`] |
//! | `diverging` | why it will not converge, and what would help: [`Diverging`] |
//! | `bucket` | when the next bytes may leave: the [`Bucket`] of a bandwidth limit |
//! | `forecast` | whether and how a guest would move, before anything is sent: [`Forecast`] |

mod auto;
mod bucket;
mod course;
mod courses;
mod curve;
mod decision;
mod diverging;
mod forecast;
mod history;
mod limits;
mod lost;
mod lost_so_far;
mod named;
mod next;
mod outlook;
mod prediction;
mod round;
mod units;
mod write_shares;
mod writes;

unstable! { use bucket::Bucket; }
unstable! { use course::{Course, Offer}; }
pub use curve::DirtySample;
unstable! { use curve::DirtyCurve; }
unstable! { use decision::{Convergence, Inside}; }
unstable! { use diverging::{Diverging, Futile, Help, Why}; }
pub use forecast::Forecast;
unstable! { use forecast::{ForecastRound, Plan}; }
unstable! { use history::History; }
unstable! { use round::{LaneLoad, Round}; }
pub use limits::{IfStuck, Limits, Policy};
unstable! { use limits::IfStuckError; }
unstable! { use lost::Lost; }
pub use next::Decision;
unstable! { use outlook::{End, Outlook}; }
pub(crate) use prediction::STATE_HELD_MAX;
pub use prediction::SwitchCost;
unstable! { use prediction::{Downtime, HandoverCost, LinkLimit, SAFETY}; }
unstable! { use write_shares::WriteShares; }
unstable! { use writes::Writes; }

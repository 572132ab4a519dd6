//! Shared by the migration of a guest and the transfer of a file, beneath [`source`](crate::source),
//! [`destination`](crate::destination) and [`image`](crate::image).

mod answer;
mod attempt_records;
mod cancel;
mod connect;
mod error;
mod greeter;
mod greeting;
mod guest_heartbeat;
mod lane_stats;
mod link;
mod listener;
mod open;
mod opening;
mod outcome;
mod pass;
mod rate_limiter;
mod routes;
mod send_gate;
mod sheltered;
mod turned_away;

pub(crate) use answer::{answer_rounds, await_other_lanes, out_of_turn};
pub(crate) use attempt_records::AttemptRecords;
pub use cancel::Cancel;
pub(crate) use connect::{connect, new_attempt_id};
pub use error::SessionError;
pub(crate) use guest_heartbeat::HeartbeatAt;
pub(crate) use link::Link;
pub(crate) use listener::{AttemptRoute, Listener, TICK};
pub(crate) use open::{FellBack, unexpected};
pub(crate) use opening::{ArrivalError, explain_lanes, next_opening, prepare_any};
pub(crate) use pass::{Pass, PrecopyPass};
pub(crate) use rate_limiter::RateLimiter;
pub(crate) use routes::Reconnect;
pub(crate) use send_gate::{PassProgress, SendGate};
pub(crate) use sheltered::Sheltered;

//! What the migration of a guest and the transfer of a file share, beneath [`source`](crate::source),
//! [`destination`](crate::destination) and [`image`](crate::image).

mod cancel;
mod guest_heartbeat;
mod lane_stats;
mod link;
mod pass;
mod rate_limiter;
mod send_gate;
mod sheltered;

pub use cancel::Cancel;
pub(crate) use guest_heartbeat::HeartbeatAt;
pub(crate) use link::{Link, connect, new_attempt_id, unexpected};
pub(crate) use pass::PrecopyPass;
pub(crate) use rate_limiter::RateLimiter;
pub(crate) use send_gate::SendGate;
pub(crate) use sheltered::Sheltered;

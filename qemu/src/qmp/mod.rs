//! A client of QEMU's machine protocol: JSON objects, one a line, over a unix socket.
//!
//! The client is our own because `qapi` 0.15 has no time limit for a command, sends no descriptors, and makes
//! a lost answer an I/O error like any other.
//!
//! QEMU is a peer like others: its lines and events are bounded, and each wait has a limit. An answer that
//! does not come leaves it open whether QEMU executed the command ([`QmpError::is_unknown`]).

mod client;
mod connect;
mod connection;
mod error;
mod events;
mod line;

pub use self::client::{ANSWER_MAX, Client};
pub use self::connect::Peer;
pub use self::error::QmpError;
pub use self::events::{Event, Events, Notice};

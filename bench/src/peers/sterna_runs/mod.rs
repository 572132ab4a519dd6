//! Sterna itself: its command as an operator uses it, and its engine between two guests in this process.

mod command;
mod engine;
mod guest;

pub(crate) use command::{Ends, first_byte_ms, migrate};
pub(crate) use engine::{
    LANES_RAM_BYTES, busy, lane_rounds, lanes, lanes_within, own_cpu_s_per_gib, sparse, zeros_mb,
};

//! What the tests of the monitor share.

#![allow(dead_code, unreachable_pub, reason = "not every test uses all of it")]

pub mod fake;
pub mod qemu;

use std::time::Duration;

/// Longer than anything that is awaited takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

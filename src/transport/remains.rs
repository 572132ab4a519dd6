//! The remains of the destination's ends after revocation.

use std::fmt::Debug;

use thiserror::Error;

use super::error::TransportError;

/// What is left of a [`LaneReceiver`](super::LaneReceiver) after revocation: memory that is still registered,
/// and so pinned. It keeps that memory mapped. Dropping it releases the memory too, but ignores failures.
pub trait Remains: Send + Debug {
    /// Releases the memory, in a time that grows with RAM.
    ///
    /// # Errors
    /// [`Leak`]: a device refused. The guest is unaffected, but the memory stays pinned.
    fn release(self: Box<Self>) -> Result<(), Leak>;
}

/// Guest RAM that a device keeps pinned, although no peer can reach it.
#[derive(Debug, Error)]
#[error(
    "a device keeps {} MiB of guest RAM pinned, which is freed when this process ends: {error}",
    bytes.div_ceil(1 << 20)
)]
pub struct Leak {
    /// How much.
    pub bytes: u64,
    /// The device's first answer.
    pub error: TransportError,
}

/// Nothing is left.
impl Remains for () {
    fn release(self: Box<Self>) -> Result<(), Leak> {
        Ok(())
    }
}

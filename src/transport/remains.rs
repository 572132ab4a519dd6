//! What revocation leaves of the destination's ends.

use std::fmt::Debug;

use thiserror::Error;

use super::error::TransportError;

/// What is left of a [`LaneReceiver`](super::LaneReceiver) once nobody can write to guest RAM through it: memory that is still
/// registered, and so pinned. It keeps that memory mapped. To drop it lets go of all too, without a word of what failed.
pub trait Remains: Send + Debug {
    /// Lets go of it, which takes a time that grows with RAM.
    ///
    /// # Errors
    /// [`Leak`]: a device would not let go. The guest is none the worse for it, but the memory stays pinned.
    fn release(self: Box<Self>) -> Result<(), Leak>;
}

/// Guest RAM of which a device does not let go, though nobody can reach it.
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

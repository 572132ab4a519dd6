//! The context of all steps of a migration.

use std::time::Instant;

use super::durable_handover::DurableHandover;
use super::error::MigrationFailure;
use super::options::Options;
use crate::dirty::DirtyLog;
use crate::guest::SourceGuest;
use crate::panics::{Panicked, caught};
use crate::progress::Observer;
use crate::session::Link;

/// The caller's arguments.
#[derive(Clone, Copy)]
pub(super) struct Migration<'migration> {
    pub(super) guest: &'migration dyn SourceGuest,
    pub(super) options: &'migration Options,
    pub(super) observer: &'migration dyn Observer,
    pub(super) started: Instant,
}

/// The state that each step takes over from the one before: the destination, the dirty log, and the handover.
pub(super) struct Connected {
    pub(super) link: Link,
    pub(super) log: Box<dyn DirtyLog>,
    pub(super) handover: DurableHandover,
}

impl Connected {
    /// Fails if RAM has changed: the destination has made the guest with the initial RAM, and the dirty log
    /// covers no other.
    pub(super) fn check_ram(&self, migration: Migration<'_>) -> Result<(), MigrationFailure> {
        match self.link.ram.change_to(&migration.guest.ram()?) {
            None => Ok(()),
            Some(change) => Err(MigrationFailure::RamChanged(change)),
        }
    }
}

/// Ends the connection and the VMM's log. The handover is settled before, so a panic changes nothing.
pub(super) fn let_go(ends: (Link, Box<dyn DirtyLog>)) {
    if let Err(Panicked(text)) = caught(|| drop(ends)) {
        tracing::error!("the end of a migration panicked: {text}");
    }
}

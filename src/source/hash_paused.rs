//! Comparing the RAM of a paused guest, at the source.

use std::time::Duration;

use super::error::MigrationFailure;
use super::migration::{Connected, Migration};
use super::pages::Pages;
use crate::session::Link;
use crate::verify::Verify;
use crate::wire::{BlockDigests, Message};

impl Pages {
    /// For a paused guest: hashes the remaining blocks, and sends the digests; returns how many blocks'
    /// digests the destination has.
    pub(super) fn send_digests(
        &self,
        Migration { options, .. }: Migration<'_>,
        Connected { link, .. }: &mut Connected,
    ) -> Result<u64, MigrationFailure> {
        if options.verify == Verify::Off {
            return Ok(0);
        }
        let rest = self.digests.unsettled();
        for part in rest.chunks(PAUSED_CHUNK_BLOCKS) {
            options.cancel.check()?;
            let digests = link.pool.install(|| self.digests.hash(&link.ram, part))?;
            link.control.send(&Message::BlockDigests(BlockDigests { now: false, digests }))?;
        }
        Ok(self.digests.len() as u64)
    }

    /// How many blocks were hashed while the guest was paused, and how many before.
    pub(super) fn blocks_hashed(&self, verify: Verify) -> (u64, u64) {
        match verify {
            Verify::Off => (0, 0),
            Verify::Final | Verify::Full => {
                let paused = self.digests.unsettled().len() as u64;
                (paused, self.digests.len() as u64 - paused)
            }
        }
    }
}

/// How long the destination may take to compare all of its RAM.
pub(super) fn verify_max(link: &Link, verify: Verify) -> Duration {
    match verify {
        Verify::Off => Duration::ZERO,
        Verify::Final | Verify::Full => hashing_max(link.ram.layout().total_bytes()),
    }
}

/// How many blocks of a paused guest are hashed between two checks for a cancellation: 1 GiB of RAM, so that
/// workers are seldom idle at its end.
const PAUSED_CHUNK_BLOCKS: usize = 512;

/// 16 MiB/s is slow for hashing.
pub(super) fn hashing_max(bytes: u64) -> Duration {
    Duration::from_secs(bytes >> 24)
}

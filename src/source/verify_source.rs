//! Comparing RAM, the source's part: while the guest runs, and the rest while it is paused.

use std::time::{Duration, Instant};

use super::{Attempt, MigrationFailure};
use crate::control::STEP_MAX;
use crate::digest::BLOCK_PAGES;
use crate::memory::PAGE_BYTES;
use crate::progress::{Event, ms};
use crate::session::unexpected;
use crate::verify::{CHUNK_BLOCKS, Verify};
use crate::wire::{BlockDigests, Message};

impl Attempt<'_> {
    /// Asks for another round, with blocks hashed before it, if that makes the pause shorter. The switch can wait for it.
    pub(super) fn wants_to_hash(&mut self) -> bool {
        self.hash_next = self.options.verify == Verify::Final
            && !self.source_digests.worth_hashing(&self.dirty).is_empty();
        self.hash_next
    }

    /// Hashes, at both ends, the blocks of which no page is dirty, if that was asked for.
    pub(super) fn hash_if_due(&mut self) -> Result<(), MigrationFailure> {
        if !std::mem::take(&mut self.hash_next) {
            return Ok(());
        }
        let began = Instant::now();
        let blocks = self.source_digests.worth_hashing(&self.dirty);
        let mut equal = 0;
        let mut asked = false;
        for chunk in blocks.chunks(CHUNK_BLOCKS) {
            self.options.cancel.check()?;
            self.options.limits.check_time(self.started)?;
            let digests = self.link.pool.install(|| self.source_digests.hash(&self.link.ram, chunk))?;
            // The destination hashes one chunk while this side hashes the next.
            if std::mem::replace(&mut asked, true) {
                equal += self.await_checked()?;
            }
            self.link.control.send(&Message::BlockDigests(BlockDigests { now: true, digests }))?;
        }
        if asked {
            equal += self.await_checked()?;
        }
        self.source_digests.settle(&blocks, began.elapsed());
        if equal < blocks.len() as u64 {
            // Those that the guest has written to since are sent, and hashed again. Of others the destination will say so.
            tracing::info!("{} blocks differed while the guest ran", blocks.len() as u64 - equal);
        }
        self.observer.event(&Event::Hashed {
            blocks: blocks.len() as u64,
            of: self.source_digests.len() as u64,
            ms: ms(began.elapsed()),
        });
        Ok(())
    }

    fn await_checked(&mut self) -> Result<u64, MigrationFailure> {
        let limit = STEP_MAX + hashing_max(CHUNK_BLOCKS as u64 * BLOCK_PAGES * PAGE_BYTES);
        match self.link.control.receive("word of what was compared", Some(limit))? {
            Message::Checked(equal) => Ok(equal.into()),
            other => Err(unexpected("CHECKED", self.link.attempt_id, other).into()),
        }
    }

    /// How long comparing is expected to take while the guest is paused, as far as that is known.
    pub(super) fn verify_expected(&self) -> Duration {
        match self.options.verify {
            Verify::Final => self.source_digests.rest_takes(),
            Verify::Off | Verify::Full => Duration::ZERO,
        }
    }

    /// Of a paused guest: hashes what remains to be, and sends the digests; returns how many blocks the destination has digests of.
    pub(super) fn send_digests(&mut self) -> Result<u64, MigrationFailure> {
        if self.options.verify == Verify::Off {
            return Ok(0);
        }
        let rest = self.source_digests.unsettled();
        for part in rest.chunks(PAUSED_CHUNK_BLOCKS) {
            self.options.cancel.check()?;
            let digests = self.link.pool.install(|| self.source_digests.hash(&self.link.ram, part))?;
            self.link.control.send(&Message::BlockDigests(BlockDigests { now: false, digests }))?;
        }
        Ok(self.source_digests.len() as u64)
    }

    /// How many blocks were hashed while the guest was paused, and how many before.
    pub(super) fn blocks_hashed(&self) -> (u64, u64) {
        match self.options.verify {
            Verify::Off => (0, 0),
            Verify::Final | Verify::Full => {
                let paused = self.source_digests.unsettled().len() as u64;
                (paused, self.source_digests.len() as u64 - paused)
            }
        }
    }

    /// How long the destination may take to compare all of its RAM.
    pub(super) fn verify_max(&self) -> Duration {
        match self.options.verify {
            Verify::Off => Duration::ZERO,
            Verify::Final | Verify::Full => hashing_max(self.link.ram.layout().total_bytes()),
        }
    }
}

/// How many blocks to hash of a paused guest before it is looked whether that is still wanted: 1 GiB of RAM, so that workers are
/// seldom idle at the end of it.
const PAUSED_CHUNK_BLOCKS: usize = 512;

/// 16 MiB/s is slow for hashing.
fn hashing_max(bytes: u64) -> Duration {
    Duration::from_secs(bytes >> 24)
}

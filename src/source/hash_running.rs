//! Comparing RAM while the guest runs, at the source.

use std::time::{Duration, Instant};

use super::error::MigrationFailure;
use super::hash_paused::hashing_max;
use super::migration::Migration;
use super::precopy::Precopy;
use crate::control::STEP_MAX;
use crate::digest::BLOCK_PAGES;
use crate::memory::PAGE_BYTES;
use crate::progress::{Event, ms};
use crate::session::{Link, unexpected};
use crate::verify::{CHUNK_BLOCKS, Verify};
use crate::wire::{BlockDigests, Message};

impl Precopy<'_> {
    /// Asks for another round, with blocks hashed before it, if that shortens the pause. The switch can wait
    /// for it.
    pub(super) fn wants_to_hash(&mut self) -> bool {
        self.hash_next = self.migration.options.verify == Verify::Final
            && !self.pages.digests.worth_hashing(&self.pages.dirty).is_empty();
        self.hash_next
    }

    /// Hashes, at both ends, the blocks without dirty pages, if a hashing was requested.
    pub(super) fn hash_if_due(&mut self) -> Result<(), MigrationFailure> {
        if !std::mem::take(&mut self.hash_next) {
            return Ok(());
        }
        let Migration { options, observer, started, .. } = self.migration;
        let (pages, link) = (&mut self.pages, &mut self.connected.link);
        let began = Instant::now();
        let blocks = pages.digests.worth_hashing(&pages.dirty);
        let mut equal = 0;
        let mut asked = false;
        for chunk in blocks.chunks(CHUNK_BLOCKS) {
            options.cancel.check()?;
            options.limits.check_time(started)?;
            let digests = link.pool.install(|| pages.digests.hash(&link.ram, chunk))?;
            // The destination hashes one chunk while the source hashes the next.
            if std::mem::replace(&mut asked, true) {
                equal += await_checked(link)?;
            }
            link.control.send(&Message::BlockDigests(BlockDigests { now: true, digests }))?;
        }
        if asked {
            equal += await_checked(link)?;
        }
        pages.digests.settle(&blocks, began.elapsed());
        if equal < blocks.len() as u64 {
            // Blocks that the guest has written to since are sent and hashed again. The destination will
            // report any others.
            tracing::info!("{} blocks differed while the guest ran", blocks.len() as u64 - equal);
        }
        observer.event(&Event::Hashed {
            blocks: blocks.len() as u64,
            of: pages.digests.len() as u64,
            ms: ms(began.elapsed()),
        });
        Ok(())
    }

    /// The expected duration of comparing while the guest is paused, as far as known.
    pub(super) fn verify_expected(&self) -> Duration {
        match self.migration.options.verify {
            Verify::Final => self.pages.digests.rest_takes(),
            Verify::Off | Verify::Full => Duration::ZERO,
        }
    }
}

fn await_checked(link: &mut Link) -> Result<u64, MigrationFailure> {
    let limit = STEP_MAX + hashing_max(CHUNK_BLOCKS as u64 * BLOCK_PAGES * PAGE_BYTES);
    match link.control.receive("word of what was compared", Some(limit))? {
        Message::Checked(equal) => Ok(equal.into()),
        other => Err(unexpected("CHECKED", link.attempt_id, other).into()),
    }
}

//! Comparing RAM, the source's part: while the guest runs, and the rest while it is paused.

use std::time::{Duration, Instant};

use super::error::MigrationFailure;
use super::migration::{Connected, Migration};
use super::pages::Pages;
use super::precopy::Precopy;
use crate::control::STEP_MAX;
use crate::digest::BLOCK_PAGES;
use crate::memory::PAGE_BYTES;
use crate::progress::{Event, ms};
use crate::session::{Link, unexpected};
use crate::verify::{CHUNK_BLOCKS, Verify};
use crate::wire::{BlockDigests, Message};

impl Precopy<'_> {
    /// Asks for another round, with blocks hashed before it, if that makes the pause shorter. The switch can wait for it.
    pub(super) fn wants_to_hash(&mut self) -> bool {
        self.hash_next = self.migration.options.verify == Verify::Final
            && !self.pages.digests.worth_hashing(&self.pages.dirty).is_empty();
        self.hash_next
    }

    /// Hashes, at both ends, the blocks of which no page is dirty, if that was asked for.
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
            // The destination hashes one chunk while this side hashes the next.
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
            // Those that the guest has written to since are sent, and hashed again. Of others the destination will say so.
            tracing::info!("{} blocks differed while the guest ran", blocks.len() as u64 - equal);
        }
        observer.event(&Event::Hashed {
            blocks: blocks.len() as u64,
            of: pages.digests.len() as u64,
            ms: ms(began.elapsed()),
        });
        Ok(())
    }

    /// How long comparing is expected to take while the guest is paused, as far as that is known.
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

impl Pages {
    /// Of a paused guest: hashes what remains to be, and sends the digests; returns how many blocks the destination has digests of.
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

/// How many blocks of a paused guest are hashed between two looks at whether the migration was cancelled: 1 GiB of RAM, so that
/// workers are seldom idle at the end of it.
const PAUSED_CHUNK_BLOCKS: usize = 512;

/// 16 MiB/s is slow for hashing.
fn hashing_max(bytes: u64) -> Duration {
    Duration::from_secs(bytes >> 24)
}

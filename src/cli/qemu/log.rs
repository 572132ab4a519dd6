//! The dirty log that QEMU's stream feeds.

use std::sync::Arc;

use sterna::dirty::{CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty};
use sterna_qemu::source::SourceQemu;
use sterna_qemu::tracker::Naming;

/// The pages that QEMU names.
#[derive(Debug)]
pub(super) struct QemuLog(pub(super) Arc<SourceQemu>);

impl DirtyLog for QemuLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        self.0.start().map_err(DirtyError::vmm)?;
        Ok(InitiallyDirty::AsNamed)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(match self.0.catch_up().map_err(DirtyError::vmm)? {
            Naming::PassEnded { found_pages } => CaughtUp::Fully { unnamed_pages: found_pages },
            Naming::Partly => CaughtUp::Partly,
            Naming::Paused { since } => CaughtUp::Paused { since },
        })
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        let tracker = self.0.tracker().map_err(DirtyError::vmm)?;
        let words = 0..dirty.words().len();
        tracker.pages().take(region, words, |word, bits| dirty.mark_word(word, bits & !forgotten(word)));
        Ok(())
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        // QEMU watched each page again before it named the page.
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        // A guest that was given away, or may have been, stays paused.
        self.0.stop().map_err(DirtyError::vmm)
    }
}

/// The pages of a word that a test makes this log forget, to see that a comparison finds them.
#[cfg(debug_assertions)]
fn forgotten(word: usize) -> u64 {
    static FORGETS: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| std::env::var_os("STERNA_TEST_FORGETS_PAGES").is_some());
    // One page in 1024.
    u64::from(*FORGETS && word.is_multiple_of(16)) << (word % 61)
}

#[cfg(not(debug_assertions))]
fn forgotten(_word: usize) -> u64 {
    0
}

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
        tracker.pages().take(region, words, |word, bits| dirty.mark_word(word, bits));
        Ok(())
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        // QEMU watched each page again before it named the page.
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.0.take_back().map_err(DirtyError::vmm)?;
        Ok(())
    }
}

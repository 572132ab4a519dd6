//! All multifd channels of one migration.

use std::time::Duration;

use crate::input::Input;
use crate::multifd::channel::Channel;
use crate::multifd::error::{ChannelError, ChannelsError};
use crate::multifd::header::Dialect;
use crate::multifd::pages::ChannelPages;
use crate::multifd::progress::Progress;
use crate::names::{PageNames, SharedBlock};
use crate::page::Marks;

/// The channels of one migration. A thread for each calls [`read`](Self::read); the reader of the main
/// channel calls [`finish`](Self::finish).
///
/// If a channel fails, the migration has failed: the thread that gets the error must cut the main channel
/// too, or its reader waits for QEMU.
#[derive(Debug)]
pub struct Channels {
    shared: Vec<SharedBlock>,
    dialect: Dialect,
    progress: Progress,
}

impl Channels {
    /// Expects so many channels. The pages that they bring of blocks that are not shared have a bound
    /// together.
    pub fn new(channels: usize, dialect: Dialect, shared: &[SharedBlock], unshared_max_bytes: u64) -> Self {
        let progress = Progress::new(channels, unshared_max_bytes);
        Self { shared: shared.to_vec(), dialect, progress }
    }

    /// Reads a channel to its end, and names the pages of shared blocks. The indexes are those of the blocks
    /// given to [`new`](Self::new).
    pub fn read(&self, input: &mut dyn Input, names: &dyn PageNames) -> Result<(), ChannelError> {
        let (dialect, shared, progress) = (self.dialect, &self.shared, &self.progress);
        Channel { input, dialect, shared, names, progress }.read()
    }

    /// Waits until each channel has had the SYNC packets that belong to the marks of the main channel, and
    /// returns the pages of blocks that are not shared. Fails if a channel fails, ends before that, or if no
    /// packet arrives on any channel for as long as `silence`.
    ///
    /// After this, a packet with pages is an error that [`read`](Self::read) returns: a caller waits for the
    /// ends of all channels before it relies on the names.
    pub fn finish(&self, marks: Marks, silence: Duration) -> Result<ChannelPages, ChannelsError> {
        self.progress.finish(marks.syncs(), silence)
    }

    /// The first failure of a channel.
    pub fn failure(&self) -> Option<ChannelError> {
        self.progress.failure()
    }
}

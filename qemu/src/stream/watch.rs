//! What the reader of a stream reports while it reads, and what it asks for.

use crate::multifd::error::ChannelsError;
use crate::multifd::pages::ChannelPages;
use crate::page::Marks;

/// How far the stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// QEMU announced its blocks, and the shared ones are among them.
    RamStart,
    /// A section of RAM has ended that is not the last.
    RamPart,
    /// A flush mark for the multifd channels.
    Flush,
    /// The last section of RAM begins: the guest is stopped. QEMU holds its big lock from this stage until
    /// the end of the stream, and its monitor does not answer meanwhile.
    RamEnd,
    /// All pages are named, those of the multifd channels included.
    RamComplete,
}

/// Receives what the reader of a stream reports. The reader waits for each call: a caller that does not
/// return holds QEMU, which is harmless before [`Stage::RamEnd`].
pub trait Watch {
    /// The stream has come to a stage, with so many marks until then.
    fn reached(&mut self, stage: Stage, marks: Marks);

    /// The main channel has named its last page. Waits until every multifd channel has had all its pages
    /// ([`Channels::finish`](crate::multifd::Channels::finish)), and returns those of blocks that are not
    /// shared.
    fn finish_channels(&mut self, marks: Marks) -> Result<ChannelPages, ChannelsError> {
        if marks.flushes > 0 {
            return Err(ChannelsError::Unread);
        }
        Ok(ChannelPages::default())
    }
}

impl<F: FnMut(Stage)> Watch for F {
    fn reached(&mut self, stage: Stage, _: Marks) {
        self(stage);
    }
}

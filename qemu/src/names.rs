//! The pages of shared RAM that a stream names: marked by the channels that read the stream, taken by the
//! engine that sends them.

/// A RAM block that this process has mapped too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedBlock {
    /// QEMU's name of the block, such as `pc.ram` or the identity of a memory backend.
    pub name: String,
    /// Its length in bytes.
    pub len_bytes: u64,
}

/// The contents of a page when QEMU named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes, which follow in the stream and are discarded.
    Bytes,
    /// Only zeros.
    Zero,
}

/// Receives the names of pages. Several threads may call it at once: one for each channel of the stream.
pub trait PageNames: Sync {
    /// QEMU named a page, of 4 KiB, of the shared block with this index.
    fn named(&self, block: usize, page: u64, content: Content);
}

//! Lists of writes, filled once and posted with one doorbell.

use std::io;

use crate::memory_region::{Access, MemoryRegion, RemoteKey};
use crate::sys::requests::{RawTransfer, Requests};

/// The longest message of one request that a list accepts. A port may allow less; the post checks that.
pub const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// One transfer between a local region and the peer's memory: a write to the peer, or a read from it.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The local region.
    pub region: &'a MemoryRegion,
    /// The offset in the local region.
    pub offset_bytes: usize,
    /// The length, from 1 to [`MESSAGE_BYTES_MAX`].
    pub len_bytes: usize,
    /// The start in the peer's memory: an address inside one of the peer's regions.
    pub remote_address: u64,
    /// The key to that region.
    pub remote_key: RemoteKey,
    /// Returned with the completion.
    pub id: u64,
    /// Whether success is reported. Failure is always reported.
    pub signalled: bool,
}

impl Transfer<'_> {
    /// Checks the transfer against the local region; the peer's device checks the other side.
    pub(crate) fn check(&self) -> Result<RawTransfer, TransferError> {
        let region_len_bytes = self.region.len_bytes();
        let len_bytes = check_range(self.offset_bytes, self.len_bytes, region_len_bytes)?;
        Ok(RawTransfer {
            offset_bytes: self.offset_bytes,
            len_bytes,
            remote_address: self.remote_address,
            remote_key: self.remote_key.0,
            id: self.id,
            signalled: self.signalled,
        })
    }
}

/// The length in the device's type.
fn check_range(offset_bytes: usize, len_bytes: usize, region_len_bytes: usize) -> Result<u32, TransferError> {
    // Devices interpret a length of 0 as 2 GiB.
    if len_bytes == 0 {
        return Err(TransferError::Empty);
    }
    let too_long = TransferError::TooLong { len_bytes, limit_bytes: MESSAGE_BYTES_MAX };
    let device_len_bytes = u32::try_from(len_bytes).map_err(|_| too_long.clone())?;
    if len_bytes > MESSAGE_BYTES_MAX {
        return Err(too_long);
    }
    match offset_bytes.checked_add(len_bytes) {
        Some(end) if end <= region_len_bytes => Ok(device_len_bytes),
        _ => Err(TransferError::OutOfRange { offset_bytes, len_bytes, region_len_bytes }),
    }
}

/// Writes, preallocated and linked, to be posted together in the order they were pushed.
///
/// A list can be reused without end: pushing and posting allocate nothing, save when a region is used for the
/// first time.
#[derive(Debug)]
pub struct WriteList {
    requests: Requests,
    longest_bytes: u32,
}

impl WriteList {
    /// An empty list for up to `capacity` writes, at least one.
    pub fn with_capacity(capacity: usize) -> WriteList {
        WriteList { requests: Requests::with_capacity(capacity), longest_bytes: 0 }
    }

    /// Appends a write.
    ///
    /// # Errors
    /// [`TransferError::Full`], or another when the transfer does not lie inside its region; the list is
    /// unchanged.
    pub fn push(&mut self, write: Transfer<'_>) -> Result<(), TransferError> {
        if self.is_full() {
            return Err(TransferError::Full { capacity: self.capacity() });
        }
        let raw = write.check()?;
        self.longest_bytes = self.longest_bytes.max(raw.len_bytes);
        self.requests.push(write.region.region(), &raw);
        Ok(())
    }

    /// Requests a completion with this id for the write pushed last; does nothing on an empty list.
    pub fn signal_last(&mut self, id: u64) {
        self.requests.signal_last(id);
    }

    /// How many writes the list holds.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the list is full.
    pub fn is_full(&self) -> bool {
        self.len() == self.capacity()
    }

    /// How many writes fit.
    pub fn capacity(&self) -> usize {
        self.requests.capacity()
    }

    /// Removes all writes.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.longest_bytes = 0;
    }

    pub(crate) fn longest_bytes(&self) -> u32 {
        self.longest_bytes
    }

    pub(crate) fn requests(&mut self) -> &mut Requests {
        &mut self.requests
    }
}

/// Why a transfer cannot be posted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The list is full.
    #[error("the list is full with {capacity} writes; post it first")]
    Full {
        /// Its capacity.
        capacity: usize,
    },
    /// The transfer is empty.
    #[error("a transfer of no bytes")]
    Empty,
    /// Longer than one message may be.
    #[error(
        "a transfer of {len_bytes} bytes is longer than one message may be, {limit_bytes} bytes; split it"
    )]
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The transfer does not lie inside the region.
    #[error("{len_bytes} bytes from byte {offset_bytes} leave the region of {region_len_bytes} bytes")]
    OutOfRange {
        /// Its offset.
        offset_bytes: usize,
        /// Its length.
        len_bytes: usize,
        /// The region's length.
        region_len_bytes: usize,
    },
    /// The transfer reads into a region that was registered without local write.
    #[error("a read needs a region that the device may write; this one was registered as {access:?}")]
    NotWritable {
        /// What the region was registered for.
        access: Access,
    },
}

/// Why requests were not posted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The queue pair has no peer yet.
    #[error("the queue pair is not connected")]
    NotConnected,
    /// A region of another protection domain.
    #[error("a region belongs to another protection domain than the queue pair")]
    ForeignRegion,
    /// The transfer is invalid.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The device refused a request; the requests before it are posted.
    #[error(
        "the device took {posted} of {requested} work requests: {source}. ENOMEM means that more requests \
         are outstanding than the queue pair was created for"
    )]
    Refused {
        /// How many were posted.
        posted: usize,
        /// How many the caller asked for.
        requested: usize,
        /// The errno.
        source: io::Error,
    },
}

impl PostError {
    /// How many requests were posted despite the error.
    pub fn posted(&self) -> usize {
        match self {
            PostError::Refused { posted, .. } => *posted,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_fill_its_region_and_not_leave_it() {
        assert_eq!(check_range(0, 4096, 4096), Ok(4096));
        assert_eq!(check_range(4095, 1, 4096), Ok(1));
        for (offset_bytes, len_bytes) in
            [(0, 4097), (1, 4096), (4096, 1), (usize::MAX, 1), (usize::MAX, 4096)]
        {
            let expected = TransferError::OutOfRange { offset_bytes, len_bytes, region_len_bytes: 4096 };
            assert_eq!(check_range(offset_bytes, len_bytes, 4096), Err(expected));
        }
    }

    #[test]
    fn no_message_is_empty_or_longer_than_the_longest() {
        assert_eq!(check_range(0, 0, 4096), Err(TransferError::Empty));
        assert_eq!(check_range(0, MESSAGE_BYTES_MAX, usize::MAX), Ok(1 << 30));
        for len_bytes in [MESSAGE_BYTES_MAX + 1, 1 << 32, usize::MAX] {
            let result = check_range(0, len_bytes, usize::MAX);
            assert!(matches!(result, Err(TransferError::TooLong { .. })), "{result:?}");
        }
    }

    #[test]
    fn a_list_has_room_for_at_least_one() {
        let list = WriteList::with_capacity(0);
        assert_eq!((list.capacity(), list.len(), list.is_full()), (1, 0, false));
    }
}

//! The destination's end: frames that arrive, and the VMM that reads them.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::mem;
use std::sync::mpsc::{self, Sender};
use std::thread;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::error_code::coded;
use crate::wire::{STATE_FRAME_MAX, StateFrame};

/// Errors in a saved state that a peer sent.
#[derive(Clone, Debug, Error, PartialEq, Eq, EnumDiscriminants)]
#[strum_discriminants(
    name(SavedStateErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SavedStateError {
    /// The source sent more saved state than this side accepts.
    #[error(
        "the source sent more than the {} MiB of saved state that this side takes",
        max_bytes >> 20
    )]
    TooLong {
        /// The limit of this side.
        max_bytes: u64,
    },
    /// A part of the saved state does not continue where the last one ended.
    #[error("the source sent the saved state from byte {got} on where byte {expected} was due")]
    OutOfOrder {
        /// Where the last part ended.
        expected: u64,
        /// Where this part begins.
        got: u64,
    },
    /// A part follows one that was not full, although only the last part may be short.
    #[error("the source sent more of the saved state after its last part")]
    AfterTheLast,
    /// The saved state is shorter or longer than the source announced.
    #[error(
        "{arrived_bytes} bytes of saved state have arrived of the {announced_bytes} that the source sent"
    )]
    Incomplete {
        /// The bytes that arrived.
        arrived_bytes: u64,
        /// The bytes that the source announced.
        announced_bytes: u64,
    },
}

coded!(SavedStateError, SavedStateErrorKind, "saved-state");

/// A saved state that arrives, held in memory until it may be loaded. Memory is taken as parts arrive.
#[derive(Debug)]
pub(crate) struct IncomingState {
    frames: VecDeque<Vec<u8>>,
    len_bytes: u64,
    max_bytes: u64,
}

impl IncomingState {
    /// An empty state that accepts at most this many bytes.
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self { frames: VecDeque::new(), len_bytes: 0, max_bytes }
    }

    /// Takes the next part.
    ///
    /// # Errors
    /// [`SavedStateError`] if it is out of order or exceeds the limit. The state is unusable then.
    pub(crate) fn push(&mut self, frame: StateFrame) -> Result<(), SavedStateError> {
        if frame.offset != self.len_bytes {
            return Err(SavedStateError::OutOfOrder { expected: self.len_bytes, got: frame.offset });
        }
        // Many short parts would take more memory than the bytes in them.
        if self.frames.back().is_some_and(|last| last.len() < STATE_FRAME_MAX) {
            return Err(SavedStateError::AfterTheLast);
        }
        let len_bytes = self.len_bytes.saturating_add(frame.bytes.len() as u64);
        if len_bytes > self.max_bytes {
            return Err(SavedStateError::TooLong { max_bytes: self.max_bytes });
        }
        self.len_bytes = len_bytes;
        self.frames.push_back(frame.bytes);
        Ok(())
    }

    /// The whole state, if it is as long as the source announced.
    ///
    /// # Errors
    /// [`SavedStateError::Incomplete`].
    pub(crate) fn complete(&mut self, announced_bytes: u64) -> Result<ArrivedState, SavedStateError> {
        if self.len_bytes != announced_bytes {
            return Err(SavedStateError::Incomplete { arrived_bytes: self.len_bytes, announced_bytes });
        }
        self.len_bytes = 0;
        let frames = mem::take(&mut self.frames);
        let used = if frames.len() > FREED_AT_ONCE { free_beside() } else { None };
        Ok(ArrivedState { frames, read: 0, used })
    }
}

/// A complete state. Frames are freed once read, so that the state is not in memory twice.
#[derive(Debug)]
pub(crate) struct ArrivedState {
    frames: VecDeque<Vec<u8>>,
    /// How much of the first frame was read.
    read: usize,
    /// Where frames go that were read, to be freed.
    used: Option<Sender<Vec<u8>>>,
}

/// Up to this many frames, the reader frees them itself. A thread frees more: freeing memory takes about
/// as long as reading it, and the guest waits.
const FREED_AT_ONCE: usize = 16;

/// A thread that frees the frames it gets; without one, frames are freed at once.
fn free_beside() -> Option<Sender<Vec<u8>>> {
    let (used, to_free) = mpsc::channel();
    let free = move || to_free.into_iter().for_each(drop);
    thread::Builder::new().name("state-free".into()).spawn(free).ok()?;
    Some(used)
}

impl BufRead for ArrivedState {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        Ok(self.frames.front().map_or(&[], |first| &first[self.read..]))
    }

    fn consume(&mut self, count: usize) {
        let Some(first) = self.frames.front() else { return };
        self.read = first.len().min(self.read + count);
        if self.read == first.len() {
            let read = self.frames.pop_front();
            self.read = 0;
            if let (Some(used), Some(frame)) = (&self.used, read) {
                // Freed at once if the thread is gone.
                let _ = used.send(frame);
            }
        }
    }
}

impl Read for ArrivedState {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let first = self.fill_buf()?;
        let count = first.len().min(buffer.len());
        buffer[..count].copy_from_slice(&first[..count]);
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FULL: u64 = STATE_FRAME_MAX as u64;

    fn frame(offset: u64, bytes: usize) -> StateFrame {
        StateFrame { offset, bytes: (0..bytes as u64).map(|at| byte(offset.wrapping_add(at))).collect() }
    }

    /// No two frames have the same bytes.
    fn byte(at: u64) -> u8 {
        at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
    }

    #[test]
    fn a_state_is_read_back_as_it_was_sent() {
        let mut arriving = IncomingState::new(3 * FULL);
        for (offset, bytes) in [(0, STATE_FRAME_MAX), (FULL, STATE_FRAME_MAX), (2 * FULL, 5)] {
            arriving.push(frame(offset, bytes)).unwrap();
        }
        let mut reader = arriving.complete(2 * FULL + 5).unwrap();
        let mut state = Vec::new();
        reader.read_to_end(&mut state).unwrap();
        assert_eq!(state, (0..).map(byte).take(state.len()).collect::<Vec<_>>());
        assert_eq!(state.len(), 2 * STATE_FRAME_MAX + 5);
        assert_eq!(IncomingState::new(0).complete(0).unwrap().read_to_end(&mut state).unwrap(), 0);
    }

    #[test]
    fn what_was_read_is_freed() {
        for frames in [4, FREED_AT_ONCE + 4] {
            let len_bytes = frames as u64 * FULL;
            let mut arriving = IncomingState::new(len_bytes);
            (0..frames as u64).for_each(|index| arriving.push(frame(index * FULL, STATE_FRAME_MAX)).unwrap());
            let mut reader = arriving.complete(len_bytes).unwrap();
            assert_eq!(reader.used.is_some(), frames > FREED_AT_ONCE);
            reader.read_exact(&mut vec![0; (frames - 1) * STATE_FRAME_MAX + 1]).unwrap();
            assert_eq!(reader.frames.len(), 1);
        }
    }

    #[test]
    fn parts_that_are_lost_repeated_exchanged_or_too_many_are_refused() {
        let after = |arrived: &[(u64, usize)], next: (u64, usize)| {
            let mut arriving = IncomingState::new(3 * FULL);
            arrived.iter().for_each(|&(offset, bytes)| arriving.push(frame(offset, bytes)).unwrap());
            arriving.push(frame(next.0, next.1)).unwrap_err()
        };
        let first = (0, STATE_FRAME_MAX);
        assert_eq!(after(&[], (FULL, 9)), SavedStateError::OutOfOrder { expected: 0, got: FULL });
        assert_eq!(after(&[first], first), SavedStateError::OutOfOrder { expected: FULL, got: 0 });
        assert_eq!(
            after(&[first], (u64::MAX, 9)),
            SavedStateError::OutOfOrder { expected: FULL, got: u64::MAX }
        );
        assert_eq!(after(&[(0, 9)], (9, 9)), SavedStateError::AfterTheLast);
        let full = [first, (FULL, STATE_FRAME_MAX), (2 * FULL, STATE_FRAME_MAX)];
        assert_eq!(after(&full, (3 * FULL, 1)), SavedStateError::TooLong { max_bytes: 3 * FULL });
    }

    #[test]
    fn a_state_that_is_shorter_or_longer_than_announced_is_not_given_out() {
        for announced_bytes in [0, 8, 10, u64::MAX] {
            let mut arriving = IncomingState::new(FULL);
            arriving.push(frame(0, 9)).unwrap();
            let error = arriving.complete(announced_bytes).unwrap_err();
            assert_eq!(error, SavedStateError::Incomplete { arrived_bytes: 9, announced_bytes });
        }
    }

    proptest! {
        #[test]
        fn no_parts_of_a_peer_are_held_beyond_the_limit_or_make_it_panic(
            parts in prop::collection::vec((0..4u64, 1..=STATE_FRAME_MAX), 0..8),
        ) {
            let mut arriving = IncomingState::new(2 * FULL + 1);
            for (index, bytes) in parts {
                let _ = arriving.push(frame(index * FULL, bytes));
                let held: usize = arriving.frames.iter().map(Vec::len).sum();
                prop_assert!(held as u64 == arriving.len_bytes && arriving.len_bytes <= 2 * FULL + 1);
            }
        }
    }
}

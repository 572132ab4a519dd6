use std::io::Read;

use crate::saved_state::{IncomingState, StateReader};
use crate::wire::{STATE_FRAME_MAX, StateFrame};

/// What this side takes.
const MAX_BYTES: u64 = 2 * STATE_FRAME_MAX as u64 + 7;

/// Frames of saved state: four bytes each for where the bytes belong and how many there are. The last eight
/// bytes say how long all of it is.
pub fn saved_state(input: &[u8]) {
    let Some((frames, announced)) = input.split_last_chunk::<8>() else { return };
    let mut state = IncomingState::new(MAX_BYTES);
    let mut taken = 0;
    for frame in frames.chunks_exact(8) {
        let word = |at: usize| u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let offset = u64::from(word(0)) << if frame[3] == 0xff { 32 } else { 0 };
        let len = word(4) as usize % (STATE_FRAME_MAX + 1);
        let bytes = vec![frame[0]; len.max(1)];
        let count = bytes.len() as u64;
        if state.push(StateFrame { offset, bytes }).is_ok() {
            assert_eq!(offset, taken, "what is taken follows what was taken before");
            taken += count;
        }
    }
    assert!(taken <= MAX_BYTES);
    let announced = u64::from_le_bytes(*announced);
    if let Ok(mut reader) = state.complete(announced) {
        let read = std::io::copy(&mut reader.by_ref(), &mut std::io::sink());
        assert_eq!((read.ok(), taken), (Some(announced), announced));
    }
}

/// The sections of a saved state, as a VMM reads them: some to their end, some skipped, some left.
pub fn sections(input: &[u8]) {
    let mut from = input;
    let mut state = StateReader::new(&mut from);
    while let Ok(Some(mut section)) = state.next_section() {
        let first = section.name().bytes().next().unwrap_or_default();
        let read = match first % 4 {
            0 => section.skip().is_ok(),
            1 => section.read_exact(&mut [0; 3]).is_ok(),
            _ => std::io::copy(&mut section, &mut std::io::sink()).is_ok(),
        };
        if !read {
            return;
        }
    }
    assert!(state.bytes_read() <= input.len() as u64);
    let _ = state.finish();
}

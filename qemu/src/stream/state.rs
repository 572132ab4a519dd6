//! The device state: everything after RAM, opaque.

use crate::stream::cursor::Cursor;
use crate::stream::error::StreamFault;
use crate::stream::kinds::{DESCRIPTION, EOF};

/// The first allocation, and the least by which it grows.
const GROWTH_MIN: usize = 256 << 10;
/// The end mark, the type of the description, and its length.
const DESCRIPTION_HEAD_LEN: usize = 6;

/// Reads to the end of the channel. The device state has no length: what shows that it is complete is the
/// description at its end.
pub(crate) fn read_state(cursor: &mut Cursor<'_>, max_bytes: u64) -> Result<Vec<u8>, StreamFault> {
    cursor.begin_item();
    let max = usize::try_from(max_bytes).unwrap_or(usize::MAX);
    let mut state = Vec::new();
    let mut len = 0;
    loop {
        if len == state.len() {
            // One byte more than the limit shows that the limit is exceeded.
            let room = max.saturating_add(1) - len;
            if room == 0 {
                return Err(StreamFault::StateTooLarge { max: max_bytes });
            }
            let growth = len.max(GROWTH_MIN).min(room);
            state.reserve_exact(growth);
            state.resize(len + growth, 0);
        }
        match cursor.some(&mut state[len..])? {
            0 => break,
            read => len += read,
        }
        if len > max {
            return Err(StreamFault::StateTooLarge { max: max_bytes });
        }
    }
    state.truncate(len);
    if ends_with_description(&state) { Ok(state) } else { Err(StreamFault::Ends) }
}

/// Whether the last bytes are the end mark and a description in JSON of the length that it says.
fn ends_with_description(state: &[u8]) -> bool {
    let starts = state.windows(DESCRIPTION_HEAD_LEN).enumerate().rev();
    let mut heads = starts.filter(|(_, head)| head[0] == EOF && head[1] == DESCRIPTION);
    let is_whole = |(at, head): (usize, &[u8])| {
        let json = &state[at + DESCRIPTION_HEAD_LEN..];
        let len = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
        json.len() == len as usize && json.starts_with(b"{") && json.ends_with(b"}")
    };
    heads.any(is_whole)
}

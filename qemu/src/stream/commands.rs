//! Commands between the sections.

use crate::stream::cursor::Cursor;
use crate::stream::error::StreamFault;
use crate::stream::kinds::COMMAND;

const SWITCHOVER_START: u16 = 11;

const RETURN_PATH: &str = "the capability return-path must be off";
const POSTCOPY: &str = "the capabilities postcopy-ram and postcopy-blocktime must be off";

/// Numbers, QEMU's names, and what must be off.
const REFUSED: [(u16, &str, &str); 10] = [
    (1, "OPEN_RETURN_PATH", RETURN_PATH),
    (2, "PING", RETURN_PATH),
    (3, "POSTCOPY_ADVISE", POSTCOPY),
    (4, "POSTCOPY_LISTEN", POSTCOPY),
    (5, "POSTCOPY_RUN", POSTCOPY),
    (6, "POSTCOPY_RAM_DISCARD", POSTCOPY),
    (7, "PACKAGED", POSTCOPY),
    (8, "ENABLE_COLO", "the capability x-colo must be off"),
    (9, "POSTCOPY_RESUME", POSTCOPY),
    (10, "RECV_BITMAP", POSTCOPY),
];

/// Reads a command that the destination needs too, and adds it to the blob's head: SWITCHOVER_START, once.
pub(crate) fn read_command(
    cursor: &mut Cursor<'_>,
    switchover_started: &mut bool,
    head: &mut Vec<u8>,
) -> Result<(), StreamFault> {
    let (number, len) = (cursor.u16()?, cursor.u16()?);
    if number != SWITCHOVER_START {
        let known = REFUSED.iter().find(|(refused, ..)| *refused == number);
        let (_, name, remedy) =
            *known.unwrap_or(&(number, "no name", "this version of QEMU is not supported"));
        return Err(StreamFault::Command { number, name, remedy });
    }
    if len > 0 || std::mem::replace(switchover_started, true) {
        return Err(StreamFault::MisplacedCommand { number, len });
    }
    head.push(COMMAND);
    head.extend(number.to_be_bytes());
    head.extend(len.to_be_bytes());
    Ok(())
}

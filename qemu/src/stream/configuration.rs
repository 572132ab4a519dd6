//! The header of the stream and its configuration section.

use crate::stream::cursor::Cursor;
use crate::stream::encode;
use crate::stream::error::{Section, StreamFault};
use crate::stream::kinds::{CONFIGURATION, SUBSECTION};

/// Magic and version.
const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";
/// QEMU's own names have fewer than 40 bytes.
const MACHINE_LEN_MAX: u32 = 255;
/// The version of every subsection.
const VERSION: u32 = 1;
const UUID_LEN: usize = 16;
/// All machines of the x86 have pages of 4 KiB.
const PAGE_BITS: u32 = 12;

/// Reads up to the first section and adds it to the blob's head. Returns the type of that section.
pub(crate) fn read_configuration(
    cursor: &mut Cursor<'_>,
    machine: Option<&str>,
    section: &mut Section,
    head: &mut Vec<u8>,
) -> Result<u8, StreamFault> {
    *section = Section::Header;
    let header = cursor.array()?;
    if header != HEADER {
        return Err(StreamFault::Header(header));
    }
    head.extend(header);
    *section = Section::Configuration;
    cursor.begin_item();
    let kind = cursor.u8()?;
    if kind != CONFIGURATION {
        return Err(StreamFault::NoConfiguration(kind));
    }
    head.push(CONFIGURATION);
    read_machine(cursor, machine, head)?;
    loop {
        cursor.begin_item();
        let kind = cursor.u8()?;
        if kind != SUBSECTION {
            return Ok(kind);
        }
        read_subsection(cursor, head)?;
    }
}

fn read_machine(
    cursor: &mut Cursor<'_>,
    expected: Option<&str>,
    head: &mut Vec<u8>,
) -> Result<(), StreamFault> {
    let len = cursor.u32()?;
    if len > MACHINE_LEN_MAX {
        return Err(StreamFault::MachineLength { len, max: MACHINE_LEN_MAX });
    }
    let mut name = vec![0; len as usize];
    cursor.fill(&mut name)?;
    if let Some(expected) = expected.filter(|expected| expected.as_bytes() != name) {
        let found = String::from_utf8_lossy(&name).into_owned();
        return Err(StreamFault::Machine { found, expected: expected.to_owned() });
    }
    head.extend(len.to_be_bytes());
    head.extend(name);
    Ok(())
}

fn read_subsection(cursor: &mut Cursor<'_>, head: &mut Vec<u8>) -> Result<(), StreamFault> {
    let name = cursor.counted()?.to_vec();
    let version = cursor.u32()?;
    let known = (version == VERSION).then_some(name.as_slice());
    let mut body = Vec::new();
    match known {
        Some(b"configuration/uuid") => body.extend(cursor.array::<UUID_LEN>()?),
        Some(b"configuration/target-page-bits") => {
            let bits = cursor.u32()?;
            if bits != PAGE_BITS {
                return Err(StreamFault::PageBits(bits));
            }
            body.extend(bits.to_be_bytes());
        }
        // QEMU lists only capabilities that both ends must have because they change the stream.
        Some(b"configuration/capabilities") => {
            let count = cursor.u32()?;
            if count > 0 {
                let name = String::from_utf8_lossy(cursor.counted()?).into_owned();
                return Err(StreamFault::Capability { name });
            }
            body.extend(count.to_be_bytes());
        }
        _ => {
            let name = String::from_utf8_lossy(&name).into_owned();
            return Err(StreamFault::Subsection { name, version });
        }
    }
    head.push(SUBSECTION);
    head.extend(encode::counted(&name));
    head.extend(version.to_be_bytes());
    head.extend(body);
    Ok(())
}

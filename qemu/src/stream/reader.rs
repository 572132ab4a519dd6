//! Reads a stream from its header to the end of the channel.

use crate::input::Input;
use crate::names::{PageNames, SharedBlock};
use crate::stream::blob::{Blob, footer};
use crate::stream::commands::read_command;
use crate::stream::configuration::read_configuration;
use crate::stream::cursor::Cursor;
use crate::stream::encode;
use crate::stream::error::{Section, StreamError, StreamFault};
use crate::stream::flags;
use crate::stream::kinds::{self, COMMAND, END, FULL, PART, START};
use crate::stream::records::Ram;
use crate::stream::state::read_state;
use crate::stream::watch::{Stage, Watch};

/// The only section before the end of RAM.
const RAM: &[u8] = b"ram";
/// The form of RAM's sections.
const RAM_VERSION: u32 = 4;

/// What a stream must have, and its bounds.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The blocks that this process has mapped: all must be in the stream, with the same length.
    pub shared: &'a [SharedBlock],
    /// The machine type with its version, such as `pc-q35-10.0`, where the caller knows it.
    pub machine: Option<&'a str>,
    /// How many bytes all other blocks may have together.
    pub unshared_max_bytes: u64,
    /// How many bytes the device state may have.
    pub state_max_bytes: u64,
}

/// Reads a stream to the end of the channel. Returns what the destination QEMU shall load.
///
/// Between [`Stage::RamComplete`] and the return, the channel has the state of the devices.
pub fn read(
    input: &mut dyn Input,
    expected: &Expected<'_>,
    names: &dyn PageNames,
    watch: &mut dyn Watch,
) -> Result<Blob, StreamError> {
    let mut reader = Reader {
        cursor: Cursor::new(input),
        section: Section::Header,
        head: Vec::new(),
        ram: Ram::new(expected.shared, names, expected.unshared_max_bytes),
        ram_id: None,
        watch,
    };
    match reader.read(expected) {
        Ok((ram_id, state)) => Ok(Blob { head: reader.head, unshared: reader.ram.unshared, ram_id, state }),
        Err(fault) => {
            let offset = reader.cursor.place_of(&fault);
            Err(StreamError { offset, section: reader.section, fault })
        }
    }
}

struct Reader<'a> {
    cursor: Cursor<'a>,
    /// Where an error belongs.
    section: Section,
    /// The blob up to the records of RAM's last section.
    head: Vec<u8>,
    ram: Ram<'a>,
    /// QEMU's number of RAM's sections, once it has started.
    ram_id: Option<u32>,
    watch: &'a mut dyn Watch,
}

impl Reader<'_> {
    fn read(&mut self, expected: &Expected<'_>) -> Result<(u32, Vec<u8>), StreamFault> {
        let mut kind =
            read_configuration(&mut self.cursor, expected.machine, &mut self.section, &mut self.head)?;
        let mut switchover_started = false;
        loop {
            self.section = Section::Head;
            match kind {
                COMMAND => read_command(&mut self.cursor, &mut switchover_started, &mut self.head)?,
                START | FULL => self.read_start(kind)?,
                PART => {
                    let id = self.read_id()?;
                    self.ram.read_records(&mut self.cursor, self.watch)?;
                    self.read_footer(id)?;
                    self.watch.reached(Stage::RamPart, self.ram.marks);
                }
                END => break,
                _ => return Err(StreamFault::SectionType { kind, name: kinds::name_of(kind) }),
            }
            self.cursor.begin_item();
            kind = self.cursor.u8()?;
        }
        let id = self.read_end()?;
        self.section = Section::DeviceState;
        Ok((id, read_state(&mut self.cursor, expected.state_max_bytes)?))
    }

    fn read_start(&mut self, kind: u8) -> Result<(), StreamFault> {
        let id = self.cursor.u32()?;
        let name = self.cursor.counted()?;
        if kind != START || name != RAM {
            let remedy = remedy(name);
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(StreamFault::ForeignSection { name, id, remedy });
        }
        let (instance, version) = (self.cursor.u32()?, self.cursor.u32()?);
        if (instance, version) != (0, RAM_VERSION) {
            return Err(StreamFault::RamVersion { instance, version });
        }
        if self.ram_id.replace(id).is_some() {
            return Err(StreamFault::RamTwice);
        }
        self.section = Section::Ram { id };
        self.head.push(START);
        self.head.extend(id.to_be_bytes());
        self.head.extend(encode::counted(RAM));
        self.head.extend([instance, version].map(u32::to_be_bytes).as_flattened());
        self.ram.read_table(&mut self.cursor, &mut self.head)?;
        self.watch.reached(Stage::RamStart, self.ram.marks);
        self.ram.read_records(&mut self.cursor, self.watch)?;
        self.head.extend(flags::EOS.to_be_bytes());
        self.read_footer(id)?;
        self.head.extend(footer(id));
        Ok(())
    }

    fn read_end(&mut self) -> Result<u32, StreamFault> {
        let id = self.read_id()?;
        self.head.push(END);
        self.head.extend(id.to_be_bytes());
        self.watch.reached(Stage::RamEnd, self.ram.marks);
        self.ram.read_records(&mut self.cursor, self.watch)?;
        let marks = self.ram.marks;
        let pages = self.watch.finish_channels(marks)?;
        self.ram.unshared.merge(pages, marks)?;
        self.watch.reached(Stage::RamComplete, marks);
        self.read_footer(id)?;
        Ok(id)
    }

    fn read_id(&mut self) -> Result<u32, StreamFault> {
        let id = self.cursor.u32()?;
        if self.ram_id != Some(id) {
            return Err(StreamFault::SectionId(id));
        }
        self.section = Section::Ram { id };
        Ok(id)
    }

    fn read_footer(&mut self, id: u32) -> Result<(), StreamFault> {
        self.cursor.begin_item();
        let found = self.cursor.array()?;
        if found == footer(id) { Ok(()) } else { Err(StreamFault::Footer(found)) }
    }
}

/// What to change where a section other than RAM comes first.
fn remedy(name: &[u8]) -> &'static str {
    let ends = |end: &[u8]| name.ends_with(end);
    if ends(b"virtio-mem-device-early") {
        "a guest with a virtio-mem device cannot be moved"
    } else if ends(b"dirty-bitmap") {
        "the capability dirty-bitmaps must be off"
    } else if ends(b"vfio") {
        "a guest with a VFIO device cannot be moved"
    } else if ends(b"block") {
        "the capability block must be off"
    } else {
        "a guest with a device that has such a section cannot be moved"
    }
}

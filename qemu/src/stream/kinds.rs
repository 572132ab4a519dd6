//! The types of sections: the first byte of each.

/// The end of all sections; the description of the device state follows.
pub(crate) const EOF: u8 = 0x00;
/// The first section of RAM.
pub(crate) const START: u8 = 0x01;
/// A further section of RAM.
pub(crate) const PART: u8 = 0x02;
/// The last section of RAM.
pub(crate) const END: u8 = 0x03;
/// A device that has one section.
pub(crate) const FULL: u8 = 0x04;
/// A part of a section, or of the configuration.
pub(crate) const SUBSECTION: u8 = 0x05;
/// The description of the device state, in JSON.
pub(crate) const DESCRIPTION: u8 = 0x06;
/// The machine type.
pub(crate) const CONFIGURATION: u8 = 0x07;
/// A command to the destination.
pub(crate) const COMMAND: u8 = 0x08;
/// The end of one section.
pub(crate) const FOOTER: u8 = 0x7e;

/// QEMU's name of a type.
pub(crate) fn name_of(kind: u8) -> &'static str {
    match kind {
        EOF => "EOF",
        START => "START",
        PART => "PART",
        END => "END",
        FULL => "FULL",
        SUBSECTION => "SUBSECTION",
        DESCRIPTION => "VMDESCRIPTION",
        CONFIGURATION => "CONFIGURATION",
        COMMAND => "COMMAND",
        FOOTER => "FOOTER",
        _ => "no name",
    }
}

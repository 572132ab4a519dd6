//! At which address QEMU has a block, for versions whose list of blocks does not say so.
//!
//! The list of guest memory says at which guest address a block lies; `gpa2hva` translates that address.

use super::error::SharedRamError;
use crate::monitor::{Monitor, RamBlock};
use crate::qmp::QmpError;

/// Where a piece of a block lies in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    guest_address: u64,
    /// Its start in the block.
    offset: u64,
}

/// Fills in the addresses of these blocks as far as QEMU knows them.
pub(super) fn find_missing(
    monitor: &Monitor,
    blocks: &mut [RamBlock],
    wanted: impl Iterator<Item = usize>,
) -> Result<(), SharedRamError> {
    let mut tree = None;
    for index in wanted {
        let block = &mut blocks[index];
        if block.host_address.is_some() {
            continue;
        }
        let tree = match &tree {
            Some(tree) => tree,
            None => tree.insert(monitor.human("info mtree -f")?),
        };
        block.host_address = piece_of(tree, &block.name)
            .map(|piece| host_address(monitor, &block.name, piece))
            .transpose()?
            .flatten();
    }
    Ok(())
}

fn host_address(monitor: &Monitor, name: &str, piece: Piece) -> Result<Option<u64>, QmpError> {
    let text = monitor.human(&format!("gpa2hva {:#x}", piece.guest_address))?;
    Ok(start_of_block(&text, name, piece))
}

/// `Host virtual address for 0x0 (mem0) is 0x7f12ebe00000`
fn start_of_block(text: &str, name: &str, piece: Piece) -> Option<u64> {
    let (before, address) = text.trim_end().rsplit_once(" is 0x")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    before.ends_with(&format!(" ({name})")).then(|| address.checked_sub(piece.offset))?
}

/// The first piece of a block in the memory of the machine.
fn piece_of(tree: &str, name: &str) -> Option<Piece> {
    let mut views = tree.split("FlatView #");
    let memory = views.find(|view| view.lines().any(|line| line.trim().starts_with("AS \"memory\",")))?;
    memory.lines().find_map(|line| parse_piece(line, name))
}

/// `  0000000000100000-0000000003ffffff (prio 0, ram): mem0 @0000000000100000 KVM`
fn parse_piece(line: &str, name: &str) -> Option<Piece> {
    let (range, region) = line.trim_start().split_once(" (prio ")?;
    let (kind, region) = region.split_once("): ")?;
    let after = region.strip_prefix(name)?;
    if !kind.ends_with(" ram") || !(after.is_empty() || after.starts_with(' ')) {
        return None;
    }
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = match after.split_whitespace().find_map(|word| word.strip_prefix('@')) {
        Some(offset) => number(offset)?,
        None => 0,
    };
    Some(Piece { guest_address: number(range.split_once('-')?.0)?, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "\
FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, ram): mem0
FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, rom): mem0
  00000000000a0000-00000000000bffff (prio 1, ram): vga.vram
  0000000000100000-0000000003ffffff (prio 0, ram): mem0 @0000000000100000 KVM
  0000000004000000-0000000007ffffff (prio 0, ram): mem01
";

    #[test]
    fn a_block_is_found_in_the_memory_of_the_machine_by_its_whole_name() {
        let piece = |guest_address, offset| Some(Piece { guest_address, offset });
        assert_eq!(piece_of(TREE, "mem0"), piece(0x10_0000, 0x10_0000));
        assert_eq!(piece_of(TREE, "mem01"), piece(0x400_0000, 0));
        assert_eq!(piece_of(TREE, "mem"), None);
        assert_eq!(piece_of("", "mem0"), None);
    }

    #[test]
    fn a_translation_counts_for_the_named_block_only() {
        let text = "Host virtual address for 0x100000 (mem0) is 0x7f12ebf00000\r\n";
        let piece = Piece { guest_address: 0x10_0000, offset: 0x10_0000 };
        assert_eq!(start_of_block(text, "mem0", piece), Some(0x7f12_ebe0_0000));
        assert_eq!(start_of_block(text, "em0", piece), None);
        assert_eq!(start_of_block("No memory is mapped at address 0x0", "mem0", piece), None);
    }
}

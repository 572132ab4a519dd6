//! The RAM blocks of a guest, of which the destination must have the same.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::monitor::RamBlock;

/// Firmware tables have this prefix. QEMU makes them longer where a stream asks for it.
const TABLES: &str = "/rom@";

/// A RAM block.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Block {
    /// Its name in the stream.
    pub name: String,
    /// Its present length, in bytes.
    pub used_bytes: u64,
    /// The length that it can grow to, in bytes.
    pub total_bytes: u64,
}

impl Block {
    pub(super) fn new(block: RamBlock) -> Self {
        Self { name: block.name, used_bytes: block.used_bytes, total_bytes: block.total_bytes }
    }

    /// Whether a stream with this block loads where `destination` is.
    fn loads_into(&self, destination: &Self) -> bool {
        let can_grow =
            destination.total_bytes != destination.used_bytes || destination.name.starts_with(TABLES);
        self.used_bytes == destination.used_bytes || (can_grow && self.used_bytes <= destination.total_bytes)
    }
}

/// What the blocks of the destination lack, in words.
pub(super) fn differences(source: &[Block], destination: &[Block]) -> Vec<String> {
    let by_name = |blocks| <[Block]>::iter(blocks).map(|block| (&block.name, block)).collect();
    let (source, destination): (BTreeMap<_, &Block>, BTreeMap<_, &Block>) =
        (by_name(source), by_name(destination));
    let missing = source.iter().filter_map(|(name, block)| {
        let size = size(block.used_bytes);
        match destination.get(name) {
            None => Some(format!("the memory block {name} of {size} is not at the destination")),
            Some(other) if !block.loads_into(other) => {
                let other = self::size(other.used_bytes);
                Some(format!(
                    "the memory block {name} has {size} at the source and {other} at the destination"
                ))
            }
            Some(_) => None,
        }
    });
    let extra = destination.iter().filter(|(name, _)| !source.contains_key(*name)).map(|(name, block)| {
        let size = size(block.used_bytes);
        format!("the memory block {name} of {size} is at the destination only")
    });
    missing.chain(extra).collect()
}

/// A size in the largest unit of which it is a multiple.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = units.into_iter().find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    match fits {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, used_bytes: u64, total_bytes: u64) -> Block {
        Block { name: name.into(), used_bytes, total_bytes }
    }

    #[test]
    fn a_block_of_another_size_or_none_is_named() {
        let source = [block("mem0", 1 << 30, 1 << 30), block("mem1", 1 << 20, 1 << 20)];
        let destination = [block("mem0", 512 << 20, 512 << 20), block("vga.vram", 5000, 5000)];
        assert_eq!(
            differences(&source, &destination),
            [
                "the memory block mem0 has 1 GiB at the source and 512 MiB at the destination",
                "the memory block mem1 of 1 MiB is not at the destination",
                "the memory block vga.vram of 5000 bytes is at the destination only",
            ]
        );
    }

    #[test]
    fn memory_does_not_fit_into_more_memory_either() {
        let (small, large) = ([block("mem0", 1 << 20, 1 << 20)], [block("mem0", 2 << 20, 2 << 20)]);
        assert_eq!(differences(&small, &large).len(), 1);
    }

    #[test]
    fn tables_may_grow_at_the_destination_up_to_their_room() {
        let small = [block("/rom@etc/acpi/tables", 0x2_0000, 0x20_0000)];
        let large = [block("/rom@etc/acpi/tables", 0x4_0000, 0x20_0000)];
        let too_large = [block("/rom@etc/acpi/tables", 0x40_0000, 0x40_0000)];
        assert!(differences(&small, &large).is_empty());
        assert!(differences(&large, &small).is_empty());
        assert_eq!(differences(&too_large, &small).len(), 1);
    }
}

//! The guest's memory: its backends, and the RAM blocks of a stream.

use serde::Deserialize;
use serde_json::json;

use super::Monitor;
use crate::qmp::QmpError;
use crate::text::shown;

/// The most RAM blocks that are read.
const BLOCKS_MAX: usize = 4096;

/// A memory backend: what `-object memory-backend-…` makes, or QEMU for `-m`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryBackend {
    /// Its identity. Without one, it cannot be asked for its file.
    pub id: Option<String>,
    /// Its size, in bytes.
    pub size: u64,
    /// Other processes that map the same file see what is written.
    #[serde(default)]
    pub share: bool,
    /// All pages are allocated at the start.
    #[serde(default)]
    pub prealloc: bool,
}

/// How much memory the guest has.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MemorySize {
    /// What it started with, in bytes.
    pub base_memory: u64,
    /// What was plugged in since, in bytes.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// A RAM block: what QEMU's stream calls a piece of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamBlock {
    /// Its name in the stream.
    pub name: String,
    /// The size of the host's pages behind it, in bytes.
    pub page_bytes: u64,
    /// Its present length, in bytes, which the stream announces.
    pub used_bytes: u64,
    /// The length that it can grow to, in bytes.
    pub total_bytes: u64,
    /// Its address in QEMU. QEMU before 8.0 does not list it.
    pub host_address: Option<u64>,
}

impl Monitor {
    /// The memory backends.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn memory_backends(&self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", &json!({}))
    }

    /// How much memory the guest has.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn memory_size(&self) -> Result<MemorySize, QmpError> {
        self.ask("query-memory-size-summary", &json!({}))
    }

    /// All RAM blocks that are part of the guest, shared or not, firmware and video memory included.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn ram_blocks(&self) -> Result<Vec<RamBlock>, QmpError> {
        let text = self.human("info ramblock")?;
        parse_blocks(&text).ok_or_else(|| QmpError::words("info ramblock", shown(&text)))
    }
}

fn parse_blocks(text: &str) -> Option<Vec<RamBlock>> {
    let mut lines = text.lines();
    if !lines.next()?.trim_start().starts_with("Block Name") {
        return None;
    }
    let mut blocks: Vec<_> = lines.take(BLOCKS_MAX + 1).map(parse_block).collect::<Option<_>>()?;
    let in_bounds = blocks.len() <= BLOCKS_MAX;
    blocks.retain(|block| !block.name.is_empty());
    in_bounds.then_some(blocks)
}

/// `pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f12ebe00000  rw`
fn parse_block(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    // The block of a backend that nothing uses has no name.
    let (name, words) = match words.len() {
        5 | 7 => ("", &words[..]),
        _ => (*words.first()?, &words[1..]),
    };
    let (&[count, unit, _, used, total], after) = words.split_first_chunk()?;
    let host_address = match after {
        [] => None,
        [address, ..] => Some(hexadecimal(address)?),
    };
    Some(RamBlock {
        name: name.to_owned(),
        page_bytes: count.parse::<u64>().ok()?.checked_mul(bytes_of(unit)?)?,
        used_bytes: hexadecimal(used)?,
        total_bytes: hexadecimal(total)?,
        host_address,
    })
}

fn bytes_of(unit: &str) -> Option<u64> {
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    Some(1 << shift)
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str =
        "              Block Name    PSize              Offset               Used              Total\r
                    mem0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r
    /rom@etc/acpi/tables    4 KiB  0x0000000004060000 0x0000000000020000 0x0000000000200000\r\n";

    #[test]
    fn blocks_are_read_with_and_without_addresses() {
        let old = parse_blocks(OLD).unwrap();
        assert_eq!(old[0].name, "mem0");
        assert_eq!((old[1].page_bytes, old[1].used_bytes, old[1].total_bytes), (4096, 0x20000, 0x20_0000));
        assert_eq!(old[1].host_address, None);
        let new = OLD.replace("4000000\r", "4000000 0x00007f12ebe00000  rw\r").replace("4 KiB", "2 MiB");
        let new = parse_blocks(&new).unwrap();
        assert_eq!(new[0].host_address, Some(0x7f12_ebe0_0000));
        assert_eq!(new[0].page_bytes, 2 << 20);
    }

    #[test]
    fn a_block_without_a_name_is_left_out() {
        let names =
            |text: &str| parse_blocks(text).unwrap().into_iter().map(|block| block.name).collect::<Vec<_>>();
        assert_eq!(names(&OLD.replace("mem0", "    ")), ["/rom@etc/acpi/tables"]);
    }

    #[test]
    fn another_text_is_no_list_of_blocks() {
        for text in
            ["", "unknown command: 'info ramblock'", &OLD.replace("KiB", "Kib"), &OLD.replace("0x", "")]
        {
            assert_eq!(parse_blocks(text), None, "{text}");
        }
        let many = format!("Block Name\n{}", OLD.lines().nth(1).unwrap().to_owned().repeat(2));
        assert_eq!(parse_blocks(&many).map(|blocks| blocks.len()), None);
        let line = format!("{}\n", OLD.lines().nth(1).unwrap());
        assert!(parse_blocks(&format!("Block Name\n{}", line.repeat(BLOCKS_MAX + 1))).is_none());
    }
}

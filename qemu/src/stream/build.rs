//! Streams as QEMU writes them, for tests.

use crate::page::PAGE_LEN;

/// The number of RAM's sections.
pub(crate) const RAM_ID: u32 = 2;

/// A stream under construction.
#[derive(Clone, Default)]
pub(crate) struct Stream {
    pub(crate) bytes: Vec<u8>,
}

impl Stream {
    /// Header and configuration.
    pub(crate) fn of(machine: &str) -> Self {
        let mut bytes = b"QEVM\0\0\0\x03\x07".to_vec();
        bytes.extend(u32::try_from(machine.len()).unwrap().to_be_bytes());
        bytes.extend(machine.as_bytes());
        Self { bytes }
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    pub(crate) fn u64(self, word: u64) -> Self {
        self.raw(&word.to_be_bytes())
    }

    pub(crate) fn counted(self, name: &str) -> Self {
        self.raw(&[u8::try_from(name.len()).unwrap()]).raw(name.as_bytes())
    }

    pub(crate) fn subsection(self, name: &str, body: &[u8]) -> Self {
        self.raw(&[5]).counted(name).raw(&1_u32.to_be_bytes()).raw(body)
    }

    /// The head of a START or FULL section.
    pub(crate) fn head(self, kind: u8, id: u32, name: &str, version: u32) -> Self {
        self.raw(&[kind]).raw(&id.to_be_bytes()).counted(name).raw(&[0; 4]).raw(&version.to_be_bytes())
    }

    /// START of RAM up to the table.
    pub(crate) fn start(self, blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, len)| len).sum();
        let this = self.head(1, RAM_ID, "ram", 4).u64(total | 4);
        blocks.iter().fold(this, |this, (name, len)| this.counted(name).u64(*len))
    }

    pub(crate) fn part(self) -> Self {
        self.raw(&[2]).raw(&RAM_ID.to_be_bytes())
    }

    pub(crate) fn end(self) -> Self {
        self.raw(&[3]).raw(&RAM_ID.to_be_bytes())
    }

    /// A page filled with a byte; without a name it continues the block of the record before.
    pub(crate) fn page(self, block: Option<&str>, offset: u64, fill: u8) -> Self {
        self.record(block, offset, 8).raw(&[fill; PAGE_LEN])
    }

    pub(crate) fn zero(self, block: Option<&str>, offset: u64) -> Self {
        self.record(block, offset, 2).raw(&[0])
    }

    fn record(self, block: Option<&str>, offset: u64, flags: u64) -> Self {
        match block {
            Some(name) => self.u64(offset | flags).counted(name),
            None => self.u64(offset | flags | 0x20),
        }
    }

    pub(crate) fn flush(self) -> Self {
        self.u64(0x200)
    }

    /// The mark that ends the records, and the footer.
    pub(crate) fn eos(self) -> Self {
        self.u64(0x10).raw(&[0x7e]).raw(&RAM_ID.to_be_bytes())
    }

    pub(crate) fn command(self, number: u16, data: &[u8]) -> Self {
        let len = u16::try_from(data.len()).unwrap();
        self.raw(&[8]).raw(&number.to_be_bytes()).raw(&len.to_be_bytes()).raw(data)
    }

    /// A device, the end mark and the description.
    pub(crate) fn state(self) -> Self {
        let json = br#"{"page_size": 4096, "devices": [{"name": "timer"}]}"#;
        let len = u32::try_from(json.len()).unwrap();
        let this = self.head(4, 7, "timer", 2).raw(&[0x55; 40]).raw(&[0x7e]).raw(&7_u32.to_be_bytes());
        this.raw(&[0, 6]).raw(&len.to_be_bytes()).raw(json)
    }
}

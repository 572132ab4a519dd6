//! Pages of RAM that is not shared, and the marks that order them across channels.

/// The size of a page in the stream, whatever the pages of the memory behind.
pub(crate) const PAGE_BYTES: u64 = PAGE_LEN as u64;
/// The same as a length in memory.
pub(crate) const PAGE_LEN: usize = 4096;

/// How many marks the main channel has had. QEMU sends a SYNC packet on every multifd channel beside each
/// flush mark, or, with machine types before 8.1, beside each mark that ends a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Ends of RAM sections (EOS).
    pub sections: u64,
    /// MULTIFD_FLUSH.
    pub flushes: u64,
}

impl Marks {
    /// How many SYNC packets every multifd channel has by these marks.
    pub fn syncs(self) -> u64 {
        self.within(self)
    }

    /// The same for an earlier place in a stream that had `all` marks in the end.
    pub(crate) fn within(self, all: Marks) -> u64 {
        if all.flushes > 0 { self.flushes } else { self.sections }
    }
}

/// The contents of a page that goes into the blob.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum KeptPage {
    Zero,
    Bytes(Box<[u8]>),
}

impl KeptPage {
    /// The page's buffer, to be overwritten.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        if let Self::Zero = self {
            *self = Self::Bytes(vec![0; PAGE_LEN].into());
        }
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Zero => &mut [],
        }
    }
}

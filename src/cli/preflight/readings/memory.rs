//! Memory and its limits.

use sterna::host::{self, Memlock, Tree, field, kibibytes};

/// The readings of memory and its limits.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryReadings {
    /// As returned by [`available_memory_bytes`].
    pub(crate) available_bytes: Option<u64>,
    /// How much memory may be locked.
    pub(crate) memlock: Memlock,
    /// Free pages of the default huge page size.
    pub(crate) free_huge_pages: u64,
    /// The default huge page size.
    pub(crate) huge_page_bytes: u64,
    /// `vm.max_map_count`: how many mappings a process may have.
    pub(crate) max_mappings: Option<u64>,
}

impl MemoryReadings {
    pub(crate) fn read(tree: &Tree) -> Self {
        let meminfo = tree.text("proc/meminfo").unwrap_or_default();
        Self {
            available_bytes: host::read_available(tree),
            memlock: Memlock::read(tree),
            free_huge_pages: field(&meminfo, "HugePages_Free")
                .and_then(|count| count.parse().ok())
                .unwrap_or(0),
            huge_page_bytes: kibibytes(&meminfo, "Hugepagesize").unwrap_or(0),
            max_mappings: tree.number("proc/sys/vm/max_map_count"),
        }
    }
}

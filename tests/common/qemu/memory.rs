//! The guest's RAM: which objects of QEMU hold it.

use std::path::PathBuf;

/// What holds the guest's RAM. All but the last are shared with other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    Memfd,
    /// Files in this folder, one for each machine and node.
    File(PathBuf),
    /// Huge pages of 2 MiB.
    Huge,
    /// Two NUMA nodes, each with half of the memory in a memfd.
    TwoNodes,
    Private,
}

impl Memory {
    /// The names of the RAM blocks that hold it.
    pub(crate) fn blocks(&self) -> &'static [&'static str] {
        match self {
            Self::TwoNodes => &["mem0", "mem1"],
            Self::Memfd | Self::File(_) | Self::Huge | Self::Private => &["mem0"],
        }
    }

    /// QEMU's arguments for a machine of this name, and what is appended to its `-machine`.
    pub(crate) fn arguments(&self, machine: &str, mib: u64, prealloc: bool) -> (Vec<String>, &'static str) {
        let prealloc = if prealloc { ",prealloc=on" } else { "" };
        let object = |kind: String, mib: u64| format!("{kind},size={mib}M,share=on{prealloc}");
        let one = |kind: String| vec!["-object".to_owned(), object(kind, mib)];
        match self {
            Self::Memfd => (one("memory-backend-memfd,id=mem0".to_owned()), ",memory-backend=mem0"),
            Self::Huge => (
                one("memory-backend-memfd,id=mem0,hugetlb=on,hugetlbsize=2M".to_owned()),
                ",memory-backend=mem0",
            ),
            Self::Private => (
                vec!["-object".to_owned(), format!("memory-backend-ram,id=mem0,size={mib}M")],
                ",memory-backend=mem0",
            ),
            Self::File(folder) => {
                let path = folder.join(format!("{machine}.ram"));
                let kind = format!("memory-backend-file,id=mem0,mem-path={}", path.display());
                (one(kind), ",memory-backend=mem0")
            }
            Self::TwoNodes => {
                let node = |index: u64| {
                    let memory = object(format!("memory-backend-memfd,id=mem{index}"), mib / 2);
                    let node = format!("node,nodeid={index},cpus={index},memdev=mem{index}");
                    ["-object".to_owned(), memory, "-numa".to_owned(), node]
                };
                ([0, 1].into_iter().flat_map(node).collect(), "")
            }
        }
    }
}

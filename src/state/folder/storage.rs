//! The kind of file system that a folder is on, and what it means for state.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::io::Errno;

use super::error::FolderError;

/// What to do with a file system that may not keep state on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StorageCheck {
    /// Refuse it.
    #[default]
    Refuse,
    /// Use it: the caller accepts the risk.
    Accept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// A disk, or an unknown kind.
    Plain,
    /// Writes each block to a new place, so that reserving a block gains nothing.
    CopyOnWrite,
    /// Its content is lost when the host restarts.
    Memory(&'static str),
    /// Its content may be removed with its container.
    Layers(&'static str),
    /// Other hosts may access the same files.
    Shared(&'static str),
    /// A process keeps the files, in a place that only it knows.
    Process(&'static str),
}

impl Storage {
    pub(super) fn of(file: impl AsFd) -> Result<Self, Errno> {
        // The kernel's field is wider than any of these numbers.
        let magic = u32::try_from(rustix::fs::fstatfs(file)?.f_type & 0xffff_ffff);
        Ok(magic.map_or(Self::Plain, Self::of_magic))
    }

    /// By the number that `statfs(2)` returns; most of them are in `linux/magic.h`.
    pub(super) fn of_magic(magic: u32) -> Self {
        match magic {
            // btrfs, ZFS, bcachefs, NILFS2
            0x9123_683e | 0x2fc1_2fc1 | 0xca45_1a4e | 0x3434 => Self::CopyOnWrite,
            0x0102_1994 => Self::Memory("a tmpfs"),
            0x8584_58f6 => Self::Memory("a ramfs"),
            0x9584_58f6 => Self::Memory("a hugetlbfs"),
            0x794c_7630 => Self::Layers("an overlay file system"),
            0x6175_6673 => Self::Layers("an aufs"),
            0x6969 => Self::Shared("NFS"),
            0xff53_4d42 | 0xfe53_4d42 | 0x517b => Self::Shared("SMB"),
            0x564c => Self::Shared("NCP"),
            0x0102_1997 => Self::Shared("9p"),
            0x786f_4256 => Self::Shared("a VirtualBox shared folder"),
            0x00c3_6400 => Self::Shared("CephFS"),
            0x5346_414f | 0x6b41_4653 => Self::Shared("AFS"),
            0x7375_7245 => Self::Shared("Coda"),
            0x0116_1970 => Self::Shared("GFS2"),
            0x7461_636f => Self::Shared("OCFS2"),
            0x0bd0_0bd0 => Self::Shared("Lustre"),
            0x4750_4653 => Self::Shared("Spectrum Scale"),
            0x1983_0326 => Self::Shared("BeeGFS"),
            0x2003_0528 => Self::Shared("OrangeFS"),
            0x6573_5546 => Self::Process("FUSE or virtiofs"),
            _ => Self::Plain,
        }
    }

    /// Checks that it keeps state for this host alone.
    pub(super) fn check(self, path: &Path) -> Result<(), FolderError> {
        let (kind, danger) = match self {
            Self::Plain | Self::CopyOnWrite => return Ok(()),
            Self::Memory(kind) => (kind, "the state of guests would be lost when the host restarts"),
            Self::Layers(kind) => {
                (kind, "the state of guests may be lost with the container or the live system")
            }
            Self::Shared(kind) => (
                kind,
                "another host may use the same files, and a lost connection would keep this host from its own state",
            ),
            Self::Process(kind) => {
                (kind, "whether what is written outlasts a restart of the host is not known")
            }
        };
        Err(FolderError::Storage { path: path.to_owned(), kind, danger })
    }
}

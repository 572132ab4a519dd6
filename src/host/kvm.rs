//! Whether this process may use KVM.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};

use super::tree::Tree;

/// Whether `/dev/kvm` opens for this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvmAccess {
    /// For reading and writing.
    Usable,
    /// The file does not exist.
    #[default]
    Missing,
    /// The file exists, but this process may not open it.
    Denied,
    /// The file exists, but has no driver.
    NoDriver,
    /// It did not open for another reason, with the system's message.
    Other(String),
}

/// Opens `/dev/kvm` and closes it.
#[must_use]
pub fn kvm_access() -> KvmAccess {
    KvmAccess::read(&Tree::machine())
}

impl KvmAccess {
    /// Opens `/dev/kvm` of this tree and closes it.
    #[must_use]
    pub fn read(tree: &Tree) -> Self {
        match OpenOptions::new().read(true).write(true).open(tree.path("dev/kvm")) {
            Ok(_) => Self::Usable,
            Err(error) => Self::of(&error),
        }
    }

    fn of(error: &io::Error) -> Self {
        const ENXIO: i32 = 6;
        const ENODEV: i32 = 19;
        match (error.kind(), error.raw_os_error()) {
            (ErrorKind::NotFound, _) => Self::Missing,
            (ErrorKind::PermissionDenied, _) => Self::Denied,
            (_, Some(ENXIO | ENODEV)) => Self::NoDriver,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl fmt::Display for KvmAccess {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => formatter.write_str("/dev/kvm opens"),
            Self::Missing => formatter.write_str("/dev/kvm does not exist"),
            Self::Denied => formatter.write_str("this user may not open /dev/kvm"),
            Self::NoDriver => formatter.write_str("/dev/kvm has no driver behind it"),
            Self::Other(reason) => write!(formatter, "/dev/kvm does not open: {reason}"),
        }
    }
}

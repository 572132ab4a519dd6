//! Why the files behind a guest's RAM cannot be used.

use std::io;

use thiserror::Error;

use crate::qmp::QmpError;

/// Why the files behind a guest's RAM cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SharedRamError {
    /// QEMU's monitor failed.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// No RAM block belongs to a memory backend.
    #[error(
        "no memory of the guest belongs to a memory backend; start QEMU with \
         -object memory-backend-memfd,id=mem0,size=…,share=on -machine …,memory-backend=mem0"
    )]
    NoBackend,
    /// Other processes do not see what the guest writes.
    #[error(
        "the memory {name} is not shared; start QEMU with -object memory-backend-memfd,id={name},size={bytes},\
         share=on -machine …,memory-backend={name}, or add share=on to the memory backend that it has"
    )]
    NotShared {
        /// The block.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// There is shared memory, but no file that another process could open.
    #[error(
        "no file is behind the memory {name}; use memory-backend-memfd, or memory-backend-file with a mem-path, \
         as in -object memory-backend-memfd,id={name},size={bytes},share=on"
    )]
    NoFile {
        /// The block.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// The file is mapped, but not shared and writable.
    #[error("QEMU has mapped the memory {name} privately or read-only; start it with share=on,readonly=off")]
    Mapping {
        /// The block.
        name: String,
    },
    /// QEMU says different sizes.
    #[error(
        "the block {name} has {block} bytes and its memory backend {backend}: memory that was resized cannot be \
         moved"
    )]
    Size {
        /// The block.
        name: String,
        /// Its length.
        block: u64,
        /// The size of the backend.
        backend: u64,
    },
    /// The file ends before the block does.
    #[error(
        "the file behind the memory {name} has {file} bytes, too few for {block} from its start in the file"
    )]
    Short {
        /// The block.
        name: String,
        /// The length of the file.
        file: u64,
        /// The length of the block.
        block: u64,
    },
    /// QEMU does not say where it has the block, so its file cannot be told from others.
    #[error(
        "QEMU does not say at which address it has the memory {name}, so its file cannot be told from others; \
         QEMU 8.0 and later says so"
    )]
    NoAddress {
        /// The block.
        name: String,
    },
    /// The process has no entry in `/proc`.
    #[error(
        "process {process}, which listens at QEMU's monitor, is not in /proc; run Sterna in the PID namespace \
         of QEMU or in one above it"
    )]
    Hidden {
        /// The process.
        process: i32,
    },
    /// The socket belongs to another program.
    #[error(
        "process {process}, which listens at QEMU's monitor, is no QEMU but {executable}; give QEMU a monitor \
         that it opens by itself, `-qmp unix:PATH,server=on,wait=off`"
    )]
    NotQemu {
        /// The process.
        process: i32,
        /// What it executes.
        executable: String,
    },
    /// This process may not look into QEMU.
    #[error(
        "no right to {doing} of QEMU, process {process}: {error}; run Sterna as the user of QEMU or as root; a \
         label of SELinux or AppArmor may forbid it too"
    )]
    NoRight {
        /// What was tried.
        doing: String,
        /// The process.
        process: i32,
        /// Why not.
        error: io::Error,
    },
    /// `/proc` does not answer as expected.
    #[error("cannot {doing} of QEMU, process {process}: {error}")]
    Process {
        /// What was tried.
        doing: String,
        /// The process.
        process: i32,
        /// Why not.
        error: io::Error,
    },
    /// The file failed.
    #[error("the file behind the memory {name}: {error}")]
    Io {
        /// The block.
        name: String,
        /// How.
        error: io::Error,
    },
}

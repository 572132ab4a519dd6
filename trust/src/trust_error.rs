//! Why the files of keys and trusted hosts cannot be used.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why this host's key or list of trusted hosts cannot be used or changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The file system refused an operation.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// Another user owns a file or a folder, and could change which hosts are trusted.
    #[error("{path} belongs to user {owner}, and this process runs as user {user}: change the owner")]
    Owner {
        /// The file or folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user of this process.
        user: u32,
    },
    /// Other users have more access to a file or a folder than they may have.
    #[error("other users have access to {path} (mode {mode:04o}): take it away (chmod {mend})")]
    Access {
        /// The file or folder.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// The change of permissions that is needed.
        mend: &'static str,
    },
    /// A link, a device or a folder is in the place of a file, or a link or a file in that of a folder.
    #[error("{0} is not a regular file or folder, as it must be")]
    Kind(PathBuf),
    /// The file of the host's key holds no Ed25519 key.
    #[error("{0} holds no Ed25519 key in PKCS#8 (PEM): restore it, or move it away to get a new key")]
    Key(PathBuf),
    /// The list of trusted hosts has a wrong line. No host is trusted until it is mended.
    #[error("line {number} of the list of trusted hosts is wrong: {why}")]
    Line {
        /// The line, counted from 1.
        number: usize,
        /// What is wrong.
        why: String,
    },
    /// A file is longer than any such file.
    #[error("{0} is too long to be read")]
    Long(PathBuf),
    /// The text is no fingerprint.
    #[error(
        "`{0}` is not a fingerprint, which is `SHA256:` and 43 characters, as `sterna trust show` prints it"
    )]
    Fingerprint(String),
    /// The word is no right.
    #[error("`{0}` is not a right: send, receive, images or ask")]
    Right(String),
    /// The text cannot be the name of a host in the list.
    #[error("`{0}` cannot be the name of a host: letters, digits and `-_.:`, a letter or digit first")]
    Name(String),
    /// The list has no such host or key.
    #[error("no host named {0} has such a key in the list of trusted hosts")]
    Unknown(String),
    /// The key is in the list, under another name.
    #[error("the key {fingerprint} is that of {name} already: remove that host first")]
    KeyOfOther {
        /// The host that has it.
        name: String,
        /// The key.
        fingerprint: String,
    },
    /// The list is full.
    #[error("the list of trusted hosts has {max} keys, which is the most that it may have")]
    Full {
        /// The most keys.
        max: usize,
    },
    /// The system's source of randomness failed.
    #[error("the system gives no random bytes for a key")]
    Random,
}

//! Why a control socket cannot be made, found or used.

use std::io;

use thiserror::Error;

/// Errors of control sockets.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    #[error(
        "`{0}` is no name for a guest: use up to 64 letters, digits, `-`, `_` and `.`, not beginning with `.`"
    )]
    Name(String),
    #[error("no guest named {name} runs on this host ({path}: {error})")]
    NoGuest { name: String, path: String, error: io::Error },
    #[error("a guest named {0} runs on this host already: choose another name")]
    Taken(String),
    #[error("cannot make the control socket {path}: {error}")]
    Make { path: String, error: io::Error },
    #[error(
        "cannot open {path}, the folder of the control sockets: {error}; STERNA_RUNTIME_DIR names another"
    )]
    Open { path: String, error: io::Error },
    #[error(
        "{0} belongs to another user or is open to others: it must be yours, mode 0700; STERNA_RUNTIME_DIR names another"
    )]
    Folder(String),
    #[error("{0} is not the socket of a process of yours, which alone may speak for a guest: remove it")]
    Stranger(String),
    #[error("the process that holds the guest went away: {0}")]
    Broken(#[source] io::Error),
    #[error("the process that holds the guest answers in another version's words: {0}")]
    Words(#[source] serde_json::Error),
}

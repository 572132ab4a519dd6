//! The exit codes: each says where the guest is.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};

/// For `--help`.
pub(crate) const HELP: &str = "\
Exit codes say where the guest is:
    0  done; after a migration, at the destination
    2  wrong usage
   10  failed; the guest is at the source
   11  refused before anything was sent; the guest is at the source
   12  in doubt; paused at the source, perhaps running at the destination
   13  lost: it runs nowhere (of `recover` and `demo`)
  130  cancelled (143 by SIGTERM); the guest is at the source";

/// The end of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Exit {
    /// Done as asked.
    Done,
    /// The arguments are invalid.
    Usage,
    /// Failed; a guest that was to move is at the source.
    Failed,
    /// Refused before anything was sent.
    Refused,
    /// The guest is paused at the source and may run at the destination.
    InDoubt,
    /// The guest runs nowhere.
    Lost,
    /// Cancelled; the guest is at the source.
    Cancelled,
    /// Cancelled by SIGTERM; the guest is at the source.
    Terminated,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Usage => 2,
            Exit::Failed => 10,
            Exit::Refused => 11,
            Exit::InDoubt => 12,
            Exit::Lost => 13,
            Exit::Cancelled => 130,
            Exit::Terminated => 143,
        })
    }
}

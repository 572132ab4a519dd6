//! The folder of this host's guest state.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use clap::Args;
use sterna::state::{FolderError, HostState, StorageCheck};

/// The folder of the state.
#[derive(Clone, Debug, Args)]
pub(crate) struct StateArgs {
    /// Folder of the guests' state files, on a disk of this host alone [default: $STERNA_STATE_DIR, else
    /// /var/lib/sterna for root and ~/.local/state/sterna for others]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Use the folder even on a file system that a restart empties or that other hosts share. A guest's fate
    /// may then be unknown, or another host's record be taken for this one's [default:
    /// $STERNA_STATE_DIR_ANYWAY, if it is 1]
    #[arg(long)]
    state_dir_anyway: bool,
}

impl StateArgs {
    /// Opens the state in the folder. The text of an error has a remedy.
    pub(crate) fn state(&self) -> Result<HostState, String> {
        let anyway =
            self.state_dir_anyway || env::var_os("STERNA_STATE_DIR_ANYWAY").is_some_and(|set| set == "1");
        let check = if anyway { StorageCheck::Accept } else { StorageCheck::Refuse };
        HostState::in_folder(&self.folder()?, check).map_err(|error| match error {
            FolderError::Storage { .. } => {
                format!("{error}: --state-dir names one, --state-dir-anyway takes this one all the same")
            }
            error => format!("{error}; --state-dir names another"),
        })
    }

    fn folder(&self) -> Result<PathBuf, String> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(chosen) = self.state_dir.clone().or_else(|| set("STERNA_STATE_DIR")) {
            return Ok(chosen);
        }
        if fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
            return Ok("/var/lib/sterna".into());
        }
        let state = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
        let home = || set("HOME").map(|home| home.join(".local/state"));
        match state.or_else(home) {
            Some(state) => Ok(state.join("sterna")),
            None => {
                Err("there is no folder for the state of guests: HOME is not set; name one by --state-dir"
                    .into())
            }
        }
    }
}

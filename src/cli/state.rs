//! Where this host remembers what became of the guests that it gave away or took in.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use clap::Args;
use sterna::journal::Journals;

/// The folder of the journals.
#[derive(Clone, Debug, Args)]
pub(crate) struct StateArgs {
    /// Folder of the journals of migrations, on a disk of this host alone [default: $STERNA_STATE_DIR, else /var/lib/sterna for
    /// root and ~/.local/state/sterna for others]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    /// The journals there, of which it is known that they can be written. The text of an error has a remedy.
    pub(crate) fn journals(&self) -> Result<Journals, String> {
        let journals = Journals::in_folder(self.folder()?);
        journals.prepare().map_err(|error| format!("{error}; --state-dir names another"))?;
        Ok(journals)
    }

    fn folder(&self) -> Result<PathBuf, String> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
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
            None => Err(
                "there is no folder for the journals of migrations: HOME is not set; name one by --state-dir"
                    .into(),
            ),
        }
    }
}

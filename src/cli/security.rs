//! How connections to other hosts are protected: the options that all commands share.

use std::env;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use sterna::trust::{Security, TrustStore};

use super::output::errln;

/// Where this host's key and list of trusted hosts are, or that they are not used.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
pub(crate) struct TrustArgs {
    #[command(flatten)]
    #[serde(flatten)]
    folder: TrustFolder,
    /// Do without TLS: every host on the path can read and change the guest, and every host that reaches the
    /// port can take part in its handover. Both ends need it
    #[arg(long, conflicts_with = "trust_dir")]
    insecure: bool,
}

/// The folder of this host's key and of its list of trusted hosts.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
pub(crate) struct TrustFolder {
    /// Folder of this host's key and of its list of trusted hosts [default: $STERNA_TRUST_DIR, else
    /// /etc/sterna for root and ~/.config/sterna for others]
    #[arg(long, value_name = "DIR", global = true)]
    trust_dir: Option<PathBuf>,
}

/// The same, and how much is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
pub(crate) struct SecurityArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) trust: TrustArgs,
    /// What must be encrypted beyond the default, which is TLS between hosts: the control channel, and lanes
    /// over TCP
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "insecure")]
    pub(crate) encrypt: Option<Encrypt>,
}

/// What must be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Encrypt {
    /// TLS also within this host
    Control,
    /// TLS everywhere, and pages too: no RDMA, which does not encrypt
    Required,
}

impl TrustFolder {
    /// The files in the folder.
    pub(crate) fn store(&self) -> Result<TrustStore, String> {
        self.path().map(|path| TrustStore::at(&path))
    }

    fn path(&self) -> Result<PathBuf, String> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(chosen) = self.trust_dir.clone().or_else(|| set("STERNA_TRUST_DIR")) {
            return Ok(chosen);
        }
        if geteuid().is_root() {
            return Ok("/etc/sterna".into());
        }
        let config = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
        let config = config.or_else(|| set("HOME").map(|home| home.join(".config")));
        config.map(|config| config.join("sterna")).ok_or_else(|| {
            "no folder for this host's key is known: HOME is not set; name one by --trust-dir".into()
        })
    }
}

impl TrustArgs {
    /// How connections are protected, by these options alone.
    pub(crate) fn security(&self) -> Result<Security, String> {
        Ok(if self.insecure { Security::insecure() } else { Security::trusting(self.folder.store()?) })
    }

    /// Says that nothing is protected, if that is so.
    pub(crate) fn warn(&self) {
        if self.insecure {
            errln!(
                "warning: --insecure: no TLS protects the connections to other hosts, which can be read and changed on their \
                 way, and any host can take part"
            );
        }
    }
}

impl SecurityArgs {
    /// For a host with its keys in this folder: TLS also within the host.
    pub(crate) fn everywhere(mut self, trust_dir: &Path) -> Self {
        if !self.trust.insecure {
            self.trust.folder.trust_dir = Some(trust_dir.to_owned());
            self.encrypt.get_or_insert(Encrypt::Control);
        }
        self
    }

    /// The same options for the command line of another process.
    pub(crate) fn words(&self) -> Vec<String> {
        let encrypt = self.encrypt.map(|encrypt| match encrypt {
            Encrypt::Control => "--encrypt=control".to_owned(),
            Encrypt::Required => "--encrypt=required".to_owned(),
        });
        let folder = self.trust.folder.trust_dir.as_ref();
        let folder = folder.map(|folder| format!("--trust-dir={}", folder.display()));
        let insecure = self.trust.insecure.then(|| "--insecure".to_owned());
        [encrypt, folder, insecure].into_iter().flatten().collect()
    }

    /// How connections are protected.
    pub(crate) fn security(&self) -> Result<Security, String> {
        match self.encrypt {
            None => self.trust.security(),
            Some(_) => Ok(Security::trusting_everywhere(self.trust.folder.store()?)),
        }
    }

    /// Whether pages must be encrypted: then they may take no way but TCP.
    pub(crate) fn pages_too(&self) -> bool {
        self.encrypt == Some(Encrypt::Required)
    }

    /// The same for another process of this user: with the whole path of the folder.
    pub(crate) fn resolved(&self) -> Result<Self, String> {
        let mut resolved = self.clone();
        if !self.trust.insecure {
            let path = self.trust.folder.path()?;
            let path = std::path::absolute(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            resolved.trust.folder.trust_dir = Some(path);
        }
        Ok(resolved)
    }
}

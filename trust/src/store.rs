//! The files of a host: its key, and the list of the hosts that it trusts.

use std::path::{Path, PathBuf};

use crate::fingerprint::Fingerprint;
use crate::folder::{Folder, Readers};
use crate::key::HostKey;
use crate::list::TrustedHosts;
use crate::peer::Peer;
use crate::trust_error::TrustError;

/// The folder of a host's key and of its list of trusted hosts. The files are read anew for each connection,
/// so a change counts at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustStore {
    path: PathBuf,
}

impl TrustStore {
    /// The files in this folder, which need not exist yet.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The host's key, which is made if it does not exist.
    ///
    /// # Errors
    /// [`TrustError`], also if other users can read the key or change the folder.
    pub fn host_key(&self) -> Result<HostKey, TrustError> {
        let folder = Folder::make(&self.path)?;
        if let Some(key) = read_key(&folder)? {
            return Ok(key);
        }
        folder.lock()?;
        match read_key(&folder)? {
            // Another process was faster.
            Some(key) => Ok(key),
            None => new_key(&folder),
        }
    }

    /// The hosts that this host trusts.
    ///
    /// # Errors
    /// [`TrustError`], also if a line of the list is wrong or other users can change it.
    pub fn trusted(&self) -> Result<TrustedHosts, TrustError> {
        Folder::open(&self.path)?.map_or_else(|| Ok(TrustedHosts::default()), |folder| read_list(&folder))
    }

    /// Trusts a key of a host. A host may have several; what it may do is the same for all.
    ///
    /// # Errors
    /// [`TrustError`]; the list is unchanged.
    pub fn add(&self, peer: Peer) -> Result<(), TrustError> {
        let folder = Folder::make(&self.path)?;
        folder.lock()?;
        let mut hosts = read_list(&folder)?;
        hosts.add(peer)?;
        folder.write(LIST, hosts.to_string().as_bytes())
    }

    /// Trusts a host no more, or one of its keys.
    ///
    /// # Errors
    /// [`TrustError::Unknown`] if the list has no such host or key, or another error; the list is unchanged.
    pub fn remove(&self, name: &str, fingerprint: Option<Fingerprint>) -> Result<(), TrustError> {
        let unknown = || TrustError::Unknown(name.chars().take(80).collect());
        let folder = Folder::open(&self.path)?.ok_or_else(unknown)?;
        folder.lock()?;
        let mut hosts = read_list(&folder)?;
        if hosts.remove(name, fingerprint) == 0 {
            return Err(unknown());
        }
        folder.write(LIST, hosts.to_string().as_bytes())
    }

    /// Replaces the host's key by a new one.
    ///
    /// # Errors
    /// [`TrustError`]; the key is unchanged.
    pub fn rotate(&self) -> Result<HostKey, TrustError> {
        let folder = Folder::make(&self.path)?;
        folder.lock()?;
        new_key(&folder)
    }
}

fn new_key(folder: &Folder) -> Result<HostKey, TrustError> {
    let text = HostKey::make()?;
    let key = HostKey::read(text.as_bytes()).ok_or_else(|| TrustError::Key(folder.path_of(KEY)))?;
    folder.write(KEY, text.as_bytes())?;
    Ok(key)
}

fn read_key(folder: &Folder) -> Result<Option<HostKey>, TrustError> {
    let text = folder.read(KEY, Readers::Owner)?;
    text.map(|text| HostKey::read(&text).ok_or_else(|| TrustError::Key(folder.path_of(KEY)))).transpose()
}

fn read_list(folder: &Folder) -> Result<TrustedHosts, TrustError> {
    let text = folder.read(LIST, Readers::Anyone)?.unwrap_or_default();
    TrustedHosts::read(&String::from_utf8_lossy(&text))
}

const KEY: &str = "host-key.pem";
const LIST: &str = "trusted-hosts";

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn store() -> (tempfile::TempDir, TrustStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = TrustStore::at(&folder.path().join("a/trust"));
        (folder, store)
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn tern(key: u8) -> Peer {
        Peer { name: "tern".into(), fingerprint: Fingerprint([key; 32]), rights: "send".parse().unwrap() }
    }

    #[test]
    fn a_key_is_made_at_first_use_and_stays_until_it_is_rotated() {
        let (_folder, store) = store();
        assert_eq!(store.trusted().unwrap(), TrustedHosts::default(), "and nothing is made for that");
        assert!(!store.path().exists());
        let made = store.host_key().unwrap().fingerprint();
        assert_eq!(store.host_key().unwrap().fingerprint(), made);
        let permissions = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(permissions(&store.path().join(KEY)), 0o600);
        assert_eq!(permissions(store.path()), 0o700);
        let rotated = store.rotate().unwrap().fingerprint();
        assert_ne!(rotated, made);
        assert_eq!(store.host_key().unwrap().fingerprint(), rotated);
    }

    #[test]
    fn processes_that_come_at_once_get_one_key_and_lose_no_host() {
        let (_folder, store) = store();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let work = |number| {
                let store = &store;
                scope.spawn(move || {
                    let key = store.host_key().unwrap().fingerprint();
                    store.add(Peer { name: format!("host-{number}"), ..tern(number) }).unwrap();
                    key
                })
            };
            let threads: Vec<_> = (0..8).map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
        assert_eq!(store.trusted().unwrap().iter().count(), 8);
    }

    #[test]
    fn hosts_that_are_added_are_trusted_and_those_that_are_removed_are_not() {
        let (_folder, store) = store();
        assert!(matches!(store.remove("tern", None), Err(TrustError::Unknown(_))));
        store.add(tern(1)).unwrap();
        store.add(Peer { rights: "ask".parse().unwrap(), ..tern(2) }).unwrap();
        let trusted = store.trusted().unwrap();
        assert!(trusted.iter().all(|peer| peer.rights.to_string() == "ask"));
        assert_eq!(trusted.iter().count(), 2);
        store.remove("tern", Some(Fingerprint([1; 32]))).unwrap();
        assert!(store.trusted().unwrap().with_key(Fingerprint([1; 32])).is_none());
        store.remove("tern", None).unwrap();
        assert_eq!(store.trusted().unwrap(), TrustedHosts::default());
    }

    #[test]
    fn files_that_others_could_read_or_change_are_not_used() {
        let (folder, store) = store();
        store.host_key().unwrap();
        store.add(tern(1)).unwrap();
        mode(&store.path().join(KEY), 0o640);
        assert!(matches!(store.host_key(), Err(TrustError::Access { mode: 0o640, .. })));
        mode(&store.path().join(KEY), 0o600);
        mode(&store.path().join(LIST), 0o666);
        assert!(matches!(store.trusted(), Err(TrustError::Access { .. })));
        mode(&store.path().join(LIST), 0o644);
        for above in [store.path(), store.path().parent().unwrap()] {
            mode(above, 0o777);
            assert!(matches!(store.host_key(), Err(TrustError::Access { .. })), "{above:?}");
            assert!(matches!(store.trusted(), Err(TrustError::Access { .. })), "{above:?}");
            mode(above, 0o700);
        }
        let link = folder.path().join("link");
        symlink(store.path(), &link).unwrap();
        assert!(matches!(TrustStore::at(&link).trusted(), Err(TrustError::Kind(_))));
        let key = store.path().join(KEY);
        fs::rename(&key, folder.path().join("key")).unwrap();
        symlink(folder.path().join("key"), &key).unwrap();
        assert!(matches!(store.host_key(), Err(TrustError::Kind(_))));
        assert!(store.trusted().is_ok());
    }

    #[test]
    fn a_damaged_key_is_not_replaced_by_a_new_one() {
        let (_folder, store) = store();
        store.host_key().unwrap();
        fs::write(store.path().join(KEY), "-----BEGIN PRIVATE KEY-----\n").unwrap();
        assert!(matches!(store.host_key(), Err(TrustError::Key(_))));
    }
}

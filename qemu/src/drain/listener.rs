//! The socket to which QEMU connects several channels.

use std::fs::{Permissions, set_permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::QemuError;

/// A listening socket; dropping it removes its path.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    _folder: TempDir,
}

impl Listener {
    pub(super) fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

/// Listens at a path of its own. QEMU may run as another user, so all users can connect; the acceptor looks
/// which process it is.
pub(crate) fn listen() -> Result<(Listener, PathBuf), QemuError> {
    let folder = tempfile::Builder::new().prefix("sterna-qemu-").tempdir();
    let folder = folder.map_err(|error| QemuError::Listen { path: std::env::temp_dir(), error })?;
    let path = folder.path().join("stream");
    let socket = listen_at(folder.path(), &path);
    let socket = socket.map_err(|error| QemuError::Listen { path: path.clone(), error })?;
    Ok((Listener { socket, _folder: folder }, path))
}

fn listen_at(folder: &Path, path: &Path) -> io::Result<UnixListener> {
    let socket = UnixListener::bind(path)?;
    set_permissions(path, Permissions::from_mode(0o777))?;
    // To be entered, not listed.
    set_permissions(folder, Permissions::from_mode(0o711))?;
    Ok(socket)
}

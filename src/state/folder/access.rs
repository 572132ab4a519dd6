//! Which users may change a folder or a file.

use std::path::Path;

use rustix::fs::Stat;

use super::error::FolderError;

/// Checks that only the user can change it.
pub(super) fn check_access(found: &Stat, path: &Path, user: u32) -> Result<(), FolderError> {
    if found.st_uid != user {
        return Err(FolderError::Owner { path: path.to_owned(), owner: found.st_uid, user });
    }
    if found.st_mode & OTHERS_WRITE != 0 {
        return Err(FolderError::Writable { path: path.to_owned(), mode: found.st_mode & 0o7777 });
    }
    Ok(())
}

/// Write permission of the group and of all others. An access list shows as the group's permission.
pub(super) const OTHERS_WRITE: u32 = 0o022;

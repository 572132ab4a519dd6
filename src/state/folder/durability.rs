//! Durable entries.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

/// Makes the entries of an open folder durable. Some file systems do not sync folders, and report that.
pub(super) fn sync(folder: &OwnedFd) -> Result<(), Errno> {
    match rustix::fs::fsync(folder) {
        Err(Errno::INVAL) => Ok(()),
        synced => synced,
    }
}

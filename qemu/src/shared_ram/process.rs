//! The QEMU process, as `/proc` shows it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, major, minor, openat, readlinkat, statat,
};
use rustix::io::Errno;

use super::error::SharedRamError;
use super::maps::{FileIdentity, Mapping, parse};
use crate::text::shown;

/// The most bytes of a memory map that are read: that of a process with the most mappings that Linux allows
/// by default has about 7 million.
const MAPS_MAX: u64 = 64 << 20;

/// A process. It stays the same one, even if another process gets its number later.
#[derive(Debug)]
pub(super) struct Process {
    id: i32,
    folder: OwnedFd,
}

impl Process {
    pub(super) fn open(id: i32) -> Result<Self, SharedRamError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(format!("/proc/{id}"), flags, Mode::empty()) {
            Ok(folder) => Ok(Self { id, folder }),
            Err(Errno::NOENT) => Err(SharedRamError::Hidden { process: id }),
            Err(error) => Err(SharedRamError::Process {
                doing: "find the entry".into(),
                process: id,
                error: error.into(),
            }),
        }
    }

    pub(super) fn check_is_qemu(&self) -> Result<(), SharedRamError> {
        let path = readlinkat(&self.folder, "exe", Vec::new()).map_err(self.failed("read the executable"))?;
        let path = path.to_string_lossy().into_owned();
        // Such as /usr/bin/qemu-system-x86_64, /usr/libexec/qemu-kvm, or .qemu-system-x86_64-wrapped.
        let name = path.rsplit('/').next().unwrap_or_default();
        if name.contains("qemu") {
            return Ok(());
        }
        Err(SharedRamError::NotQemu { process: self.id, executable: shown(&path) })
    }

    pub(super) fn mappings(&self) -> Result<Vec<Mapping>, SharedRamError> {
        const DOING: &str = "read the memory map";
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let maps = openat(&self.folder, "maps", flags, Mode::empty()).map_err(self.failed(DOING))?;
        let mut bytes = Vec::new();
        let read = File::from(maps).take(MAPS_MAX).read_to_end(&mut bytes);
        read.map_err(|error| self.failed_io(DOING, error))?;
        Ok(parse(&String::from_utf8_lossy(&bytes)))
    }

    /// Opens a file that the process has open, for reading and writing.
    pub(super) fn open_file(
        &self,
        wanted: FileIdentity,
        block: &str,
    ) -> Result<Option<File>, SharedRamError> {
        const LIST: &str = "list the descriptors";
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(&self.folder, "fd", flags, Mode::empty()).map_err(self.failed(LIST))?;
        for entry in Dir::read_from(&folder).map_err(self.failed(LIST))? {
            let entry = entry.map_err(self.failed(LIST))?;
            let name = entry.file_name();
            // QEMU may close descriptors meanwhile. Only the wanted file is opened, for devices may react.
            let is_wanted = |found: &Stat| identity(found) == wanted && is_regular(found);
            if !statat(&folder, name, AtFlags::empty()).is_ok_and(|found| is_wanted(&found)) {
                continue;
            }
            let doing = format!("open the file behind the memory {block}");
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            let file = openat(&folder, name, flags, Mode::empty()).map_err(self.failed(&doing))?;
            if is_wanted(&fstat(&file).map_err(self.failed(&doing))?) {
                return Ok(Some(File::from(file)));
            }
        }
        Ok(None)
    }

    fn failed(&self, doing: &str) -> impl FnOnce(Errno) -> SharedRamError {
        move |error| self.failed_io(doing, error.into())
    }

    fn failed_io(&self, doing: &str, error: io::Error) -> SharedRamError {
        let (doing, process) = (doing.to_owned(), self.id);
        match error.kind() {
            io::ErrorKind::PermissionDenied => SharedRamError::NoRight { doing, process, error },
            _ => SharedRamError::Process { doing, process, error },
        }
    }
}

fn identity(found: &Stat) -> FileIdentity {
    FileIdentity { major: major(found.st_dev), minor: minor(found.st_dev), inode: found.st_ino }
}

fn is_regular(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

//! The data disk of a guest: one raw file with ext4, which source and destination share.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

#[derive(Debug)]
pub(crate) struct Disk {
    folder: TempDir,
}

impl Disk {
    /// A new file system.
    pub(crate) fn new(mib: u64) -> Self {
        let folder = tempfile::Builder::new().prefix("sterna-disk-").tempdir().expect("a temporary folder");
        let disk = Self { folder };
        let file = File::create(disk.path()).expect("the temporary folder can be written");
        file.set_len(mib << 20).expect("a sparse file");
        let output = tool("mkfs.ext4").args(["-q", "-F", "-b", "4096"]).arg(disk.path()).output();
        let output = output.expect("mkfs.ext4, which the package e2fsprogs provides");
        assert!(output.status.success(), "{output:?}");
        disk
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// Checks the file system, which no guest may use.
    #[track_caller]
    pub(crate) fn expect_clean(&self) {
        let output =
            tool("e2fsck").args(["-f", "-n"]).arg(self.path()).output().expect("it was there before");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "the file system is damaged: {said}");
    }

    pub(super) fn arguments(&self) -> Vec<String> {
        let node = format!("file,node-name=data,filename={},cache.direct=off", self.path().display());
        let device = "virtio-blk-pci,drive=data-raw".to_owned();
        let raw = "raw,node-name=data-raw,file=data".to_owned();
        vec!["-blockdev".into(), node, "-blockdev".into(), raw, "-device".into(), device]
    }

    /// Changes a byte in each of the blocks that `is_it` names, behind the guest's back.
    pub(crate) fn damage(&self, mut is_it: impl FnMut(&[u8]) -> bool) -> usize {
        let file = OpenOptions::new().read(true).write(true).open(self.path()).expect("the file of the disk");
        let mut block = [0; 4096];
        let mut damaged = 0;
        let bytes = file.metadata().expect("an open file").len();
        for offset in (0..bytes).step_by(block.len()) {
            file.read_exact_at(&mut block, offset).expect("the file is that long");
            if is_it(&block) {
                file.write_all_at(&[!block[17]], offset + 17).expect("the file of the disk");
                damaged += 1;
            }
        }
        damaged
    }
}

/// A program that root's search path has.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

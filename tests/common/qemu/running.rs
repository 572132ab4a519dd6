//! A process of QEMU.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::monitor::Monitor;
use super::serial::Serial;
use super::wait::wait_for;

/// A running QEMU. Dropping this value kills it.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    pub(crate) name: String,
    /// The test's own monitor: QEMU serves one client a socket.
    pub(crate) monitor: Arc<Monitor>,
    folder: TempDir,
}

impl Qemu {
    pub(super) fn start(mut command: Command, name: String, folder: TempDir) -> Self {
        let what = format!("{command:?}");
        let stderr = File::create(folder.path().join("stderr")).expect("the temporary folder can be written");
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("{what} does not start: {error}"));
        let monitor = Arc::new(Monitor::new(folder.path().join("test.qmp")));
        let mut qemu = Self { child, name, monitor, folder };
        wait_for(&format!("QEMU answers on its monitor: {what}"), || {
            qemu.expect_running();
            qemu.monitor.connect()
        });
        qemu
    }

    /// The arguments for monitors and serial port, with files in this folder.
    pub(super) fn channels(folder: &Path) -> Vec<String> {
        let socket = |name: &str| format!("unix:{},server=on,wait=off", folder.join(name).display());
        let serial = format!(
            "socket,id=serial,path={},server=on,wait=off,logfile={},logappend=on",
            folder.join("serial").display(),
            folder.join("serial.log").display()
        );
        let channels = ["-qmp", &socket("qmp"), "-qmp", &socket("test.qmp"), "-chardev", &serial];
        channels.into_iter().map(str::to_owned).chain(["-serial".into(), "chardev:serial".into()]).collect()
    }

    /// The monitor's socket for the program that is tested.
    pub(crate) fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// A folder that exists as long as this QEMU.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the guest says while it is in this QEMU.
    pub(crate) fn serial(&self) -> Serial {
        Serial::new(self.folder.path().join("serial.log"), self.id())
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file with the RAM block of this name, as another process can open it.
    pub(crate) fn ram(&self, block: &str) -> PathBuf {
        let path = |arguments: Value| self.monitor.execute("qom-get", arguments);
        let property = |name: &str| json!({ "path": format!("/objects/{block}"), "property": name });
        let kind = path(json!({ "path": format!("/objects/{block}"), "property": "type" }));
        if kind == "memory-backend-file" {
            let path = path(property("mem-path"));
            return PathBuf::from(path.as_str().expect("a path"));
        }
        let bytes = path(property("size")).as_u64().expect("a size");
        let folder = format!("/proc/{}/fd", self.id());
        let entries = fs::read_dir(&folder).expect("the open files of a child").flatten();
        let mut memfds: Vec<_> = entries
            .filter(|entry| {
                let target = fs::read_link(entry.path()).unwrap_or_default();
                let is_memfd = target.to_string_lossy().starts_with("/memfd:memory-backend-memfd");
                is_memfd && fs::metadata(entry.path()).is_ok_and(|file| file.len() == bytes)
            })
            .map(|entry| entry.path())
            .collect();
        // Descriptors are handed out in the order of the objects.
        memfds.sort_by_key(|path| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()));
        let index = block.trim_start_matches("mem").parse::<usize>().expect("the rig's names of blocks");
        memfds.get(index).unwrap_or_else(|| panic!("{folder} has no memfd of {block}")).clone()
    }

    /// Reads guest RAM, by its offset in the block.
    pub(crate) fn read_ram(&self, block: &str, offset: u64, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        let file = File::open(self.ram(block)).expect("the file of guest RAM");
        file.read_exact_at(&mut content, offset).expect("the offset is within the block");
        content
    }

    /// Overwrites guest RAM behind the guest's back.
    pub(crate) fn damage_ram(&self, block: &str, offset: u64, content: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.ram(block)).expect("the file of guest RAM");
        file.write_all_at(content, offset).expect("the offset is within the block");
    }

    /// Whether QEMU runs the guest: the answer of `query-status`.
    pub(crate) fn runs(&self) -> bool {
        self.status() == "running"
    }

    /// The state of the machine in QEMU's words, such as `running`, `paused`, `postmigrate`.
    pub(crate) fn status(&self) -> String {
        let answer = self.monitor.execute("query-status", json!({}));
        answer["status"].as_str().expect("a word").to_owned()
    }

    /// The state of the migration in QEMU's words; empty before the first.
    pub(crate) fn migration_status(&self) -> String {
        let answer = self.monitor.execute("query-migrate", json!({}));
        answer["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Types a line on the guest's console.
    pub(crate) fn types(&self, line: &str) {
        let mut serial = UnixStream::connect(self.folder.path().join("serial")).expect("the serial port");
        writeln!(serial, "{line}").expect("QEMU reads the serial port");
    }

    /// Ends the load of a Linux guest in order, so that its file system is clean, and waits for QEMU's end.
    pub(crate) fn stop_linux(mut self) -> Serial {
        self.types("stop");
        let mut status = None;
        wait_for("the guest powers off", || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        let log = self.serial().text();
        assert!(status.as_ref().is_some_and(ExitStatus::success), "{status:?}\n{}\n{log}", self.stderr());
        Serial::ended(log)
    }

    /// Kills it, as a host's failure does.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    /// Lets QEMU quit, and waits for its end.
    pub(crate) fn quit(mut self) {
        self.monitor.quit();
        wait_for("QEMU quits", || self.has_ended());
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    fn expect_running(&mut self) {
        let status = self.child.try_wait().expect("it is our child");
        assert!(status.is_none(), "{} ended: {status:?}\n{}", self.name, self.stderr());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- {}\n{}\n{}", self.name, self.stderr(), self.serial().end());
        }
    }
}

//! Real QEMUs, in all versions that this machine has.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::{Client, QmpError};
use tempfile::TempDir;

use super::PATIENCE;

const PROGRAM: &str = "qemu-system-x86_64";

/// A QEMU whose guest has not started. Dropping this value ends it.
pub struct Qemu {
    pub monitor: Monitor,
    pub folder: TempDir,
    child: Child,
}

/// The programs: the one that is installed, and those that the labs have unpacked.
pub fn programs() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed =
        env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|program| program.exists());
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
    let cache = env::var_os("STERNA_LAB_CACHE").map(PathBuf::from).or_else(|| {
        let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        Some(caches.join("sterna"))
    });
    let entries = cache.and_then(|cache| fs::read_dir(cache).ok()).into_iter().flatten().flatten();
    let unpacked = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("qemu-"))
        .map(|entry| entry.path().join(PROGRAM))
        .filter(|program| program.exists());
    let found: Vec<_> = installed.into_iter().chain(unpacked).collect();
    if found.is_empty() {
        println!("SKIPPED: there is no {PROGRAM} on this machine");
    }
    found
}

/// Starts a QEMU with these arguments, and `FOLDER` replaced by a folder of its own.
pub fn start(program: &Path, arguments: &[&str]) -> Qemu {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let mut command = Command::new(program);
    command.args(["-no-user-config", "-nodefaults", "-display", "none", "-accel", "tcg", "-S"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    let own = folder.path().display().to_string();
    command.args(arguments.iter().map(|argument| argument.replace("FOLDER", &own)));
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let client = loop {
        match Client::connect(&socket) {
            Ok(client) => break client,
            Err(QmpError::Connect { .. }) if Instant::now() < deadline => {
                assert_eq!(child.try_wait().unwrap(), None, "{command:?} ended");
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => panic!("{command:?}: {error}"),
        }
    };
    Qemu { monitor: Monitor::new(client), folder, child }
}

impl Qemu {
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

//! The programs and guests that `ci/qemu` and `ci/guest` prepare.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A version of QEMU, unpacked in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) version: &'static str,
    /// Starts `qemu-system-x86_64` with the libraries and firmware of this version.
    pub(crate) path: PathBuf,
    boot_sector: PathBuf,
    linux_guest: PathBuf,
}

impl Program {
    /// The program of this version: "7.2" or "10". `None` where it or the guests are not prepared, which
    /// skips the test; it panics where tests [are demanded](is_demanded).
    pub(crate) fn find(version: &'static str) -> Option<Self> {
        let path = run("ci/qemu", &["--prepared", version])?;
        let boot_sector = run("ci/guest", &["boot-sector"])?;
        let linux_guest = run("ci/guest", &["linux"])?;
        Some(Self { version, path, boot_sector, linux_guest })
    }

    /// The boot sector, as built.
    pub(super) fn boot_sector(&self) -> Vec<u8> {
        fs::read(self.boot_sector.join("image")).expect("the image of the boot sector")
    }

    /// The folder with `vmlinuz` and `initramfs`.
    pub(super) fn linux_guest(&self) -> &Path {
        &self.linux_guest
    }
}

/// Whether a test must not be skipped for what the machine lacks: in a lab, and in CI.
pub(crate) fn is_demanded() -> bool {
    ["STERNA_LAB", "CI"].into_iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Runs a script of this repository, which prints a path.
fn run(script: &str, arguments: &[&str]) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output =
        Command::new(path).args(arguments).stdin(Stdio::null()).output().expect("bash runs the script");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let command = arguments.iter().filter(|word| !word.starts_with('-'));
        let command: Vec<_> = std::iter::once(script).chain(command.copied()).collect();
        let message = format!("{said}this test needs what `{}` provides", command.join(" "));
        assert!(!is_demanded(), "{message}");
        println!("skipped: {message}");
        return None;
    }
    Some(PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim_end()))
}

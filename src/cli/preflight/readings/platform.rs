//! Distribution, kernel, and the privileges of this process.

use std::path::{Path, PathBuf};
use std::{env, fs};

use sterna::host::{Privileges, Tree};

/// The facts that remedies depend on: distribution, kernel, privileges.
#[derive(Clone, Debug, Default)]
pub(crate) struct Platform {
    /// As `uname -r` prints it.
    pub(crate) kernel_release: String,
    /// `ID` of `/etc/os-release`, such as `debian`.
    pub(crate) distribution: String,
    /// The distribution's package tool.
    pub(crate) packages: Packages,
    /// Whether this process is in a container (a PID namespace other than the machine's).
    pub(crate) container: bool,
    /// The privileges of this process.
    pub(crate) privileges: Privileges,
}

/// The package tools that remedies name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Packages {
    /// Debian, Ubuntu.
    Apt,
    /// Fedora, Red Hat Enterprise Linux and its derivatives.
    Dnf,
    /// SUSE.
    Zypper,
    /// Arch.
    Pacman,
    /// Another one: the remedy names only the packages.
    #[default]
    Other,
}

impl Platform {
    pub(crate) fn read(tree: &Tree) -> Self {
        let release = tree.text("etc/os-release").unwrap_or_default();
        let distribution = release_field(&release, "ID");
        let like = release_field(&release, "ID_LIKE");
        Self {
            kernel_release: tree.text("proc/sys/kernel/osrelease").unwrap_or_default(),
            packages: Packages::of(&distribution, &like),
            distribution,
            container: in_container(tree),
            privileges: Privileges::read(tree),
        }
    }

    /// The command, with `sudo` unless this process is root.
    #[must_use]
    pub(crate) fn as_root(&self, command: &str) -> String {
        if self.privileges.root { command.to_owned() } else { format!("sudo {command}") }
    }

    /// The command that installs the verbs library and its drivers.
    #[must_use]
    pub(crate) fn install_verbs(&self) -> String {
        self.install(match self.packages {
            Packages::Apt => "libibverbs1 ibverbs-providers",
            Packages::Dnf => "libibverbs",
            Packages::Zypper => "libibverbs1 libibverbs",
            Packages::Pacman | Packages::Other => "rdma-core",
        })
    }

    /// The command that installs `ip` and `rdma`.
    #[must_use]
    pub(crate) fn install_iproute(&self) -> String {
        self.install(if self.packages == Packages::Dnf { "iproute" } else { "iproute2" })
    }

    /// How to get the kernel module `rdma_rxe` for a kernel that lacks it.
    #[must_use]
    pub(crate) fn install_soft_roce_module(&self) -> String {
        let kernel = &self.kernel_release;
        if self.container {
            return format!(
                "on the host, not in this container: `modprobe rdma_rxe` (the container shares the host's kernel {kernel})"
            );
        }
        match (self.packages, self.distribution.as_str()) {
            // Ubuntu keeps less common modules in a package of their own.
            (Packages::Apt, "ubuntu") => self.install(&format!("linux-modules-extra-{kernel}")),
            // Debian's `cloud` kernels are built without InfiniBand; the ordinary kernel has it.
            (Packages::Apt, _) => {
                let architecture = if env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
                format!("{}, then boot that kernel", self.install(&format!("linux-image-{architecture}")))
            }
            (Packages::Dnf, _) => self.install(&format!("kernel-modules-extra-{kernel}")),
            _ => format!("use a kernel built with CONFIG_RDMA_RXE ({kernel} is not)"),
        }
    }

    fn install(&self, packages: &str) -> String {
        match self.packages {
            Packages::Apt => self.as_root(&format!("apt install {packages}")),
            Packages::Dnf => self.as_root(&format!("dnf install {packages}")),
            Packages::Zypper => self.as_root(&format!("zypper install {packages}")),
            Packages::Pacman => self.as_root(&format!("pacman -S {packages}")),
            Packages::Other => format!("install {packages} with this system's package tool"),
        }
    }
}

impl Packages {
    fn of(distribution: &str, like: &str) -> Self {
        for name in [distribution].into_iter().chain(like.split_whitespace()) {
            match name {
                "debian" | "ubuntu" => return Self::Apt,
                "fedora" | "rhel" | "centos" => return Self::Dnf,
                "suse" | "opensuse" => return Self::Zypper,
                "arch" => return Self::Pacman,
                _ => {}
            }
        }
        Self::Other
    }
}

/// A container has a PID namespace of its own; the initial one has a fixed number (Linux,
/// include/linux/proc_ns.h). Files such as `/.dockerenv` also exist in virtual machines made from a
/// container's image.
fn in_container(tree: &Tree) -> bool {
    const INITIAL: &str = "pid:[4026531836]";
    fs::read_link(tree.path("proc/self/ns/pid")).is_ok_and(|namespace| namespace != Path::new(INITIAL))
}

fn release_field(release: &str, key: &str) -> String {
    let value = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    value.unwrap_or_default().trim_matches('"').to_owned()
}

/// The path of the program `name`: in `PATH`, or in the administrator's folders that an ordinary user's
/// `PATH` omits.
#[must_use]
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders =
        env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};

use super::tree::Tree;
use super::{Check, Outcome, Platform};

/// The readings of KVM.
#[derive(Clone, Debug, Default)]
pub struct KvmReadings {
    /// Whether `/dev/kvm` opens.
    pub access: KvmAccess,
    /// KVM's answers about itself. They take ioctls, which the VMM makes:
    /// [`Readings::take`](super::Readings::take) leaves None, and the VMM fills it in to have them judged.
    pub capabilities: Option<KvmCapabilities>,
    /// The processor's flag for hardware virtualisation: `vmx` or `svm`. None on processors other than x86.
    pub hardware: Option<&'static str>,
    /// Whether the processor is an x86, on which the flag is meaningful.
    pub x86: bool,
}

/// Whether `/dev/kvm` opens for this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvmAccess {
    /// For reading and writing.
    Usable,
    /// The file does not exist.
    #[default]
    Missing,
    /// The file exists, but this process may not open it.
    Denied,
    /// The file exists, but has no driver.
    NoDriver,
    /// It did not open for another reason, with the system's message.
    Other(String),
}

/// KVM's answers about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmCapabilities {
    /// `KVM_GET_API_VERSION`: 12 since Linux 2.6.22.
    pub api_version: i32,
    /// The flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: 0 before Linux 5.1, 1 before 5.7, 3 since.
    pub manual_dirty_log_protect: i32,
}

/// Opens `/dev/kvm` and closes it.
#[must_use]
pub fn kvm_access() -> KvmAccess {
    KvmAccess::read(&Tree::machine())
}

impl KvmReadings {
    pub(super) fn read(tree: &Tree) -> Self {
        let cpuinfo = tree.text("proc/cpuinfo").unwrap_or_default();
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        Self {
            access: KvmAccess::read(tree),
            capabilities: None,
            hardware: ["vmx", "svm"]
                .into_iter()
                .find(|flag| flags.split_whitespace().any(|word| word == *flag)),
            x86: !flags.is_empty(),
        }
    }
}

impl KvmAccess {
    fn read(tree: &Tree) -> Self {
        match OpenOptions::new().read(true).write(true).open(tree.path("dev/kvm")) {
            Ok(_) => Self::Usable,
            Err(error) => Self::of(&error),
        }
    }

    fn of(error: &io::Error) -> Self {
        const ENXIO: i32 = 6;
        const ENODEV: i32 = 19;
        match (error.kind(), error.raw_os_error()) {
            (ErrorKind::NotFound, _) => Self::Missing,
            (ErrorKind::PermissionDenied, _) => Self::Denied,
            (_, Some(ENXIO | ENODEV)) => Self::NoDriver,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl fmt::Display for KvmAccess {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => formatter.write_str("/dev/kvm opens"),
            Self::Missing => formatter.write_str("/dev/kvm does not exist"),
            Self::Denied => formatter.write_str("this user may not open /dev/kvm"),
            Self::NoDriver => formatter.write_str("/dev/kvm has no driver behind it"),
            Self::Other(reason) => write!(formatter, "/dev/kvm does not open: {reason}"),
        }
    }
}

pub(super) fn judge(kvm: &KvmReadings, platform: &Platform) -> Vec<Check> {
    let mut checks = vec![judge_access(kvm, platform)];
    if kvm.access == KvmAccess::Usable {
        checks.extend(kvm.capabilities.map(judge_dirty_log));
        checks.extend(judge_hardware(kvm));
    }
    checks
}

fn judge_access(kvm: &KvmReadings, platform: &Platform) -> Check {
    const ID: &str = "kvm.access";
    match &kvm.access {
        KvmAccess::Usable => match kvm.capabilities {
            Some(KvmCapabilities { api_version: 12, .. }) | None => {
                Check::new(ID, Outcome::Pass, "/dev/kvm opens")
            }
            Some(KvmCapabilities { api_version, .. }) => {
                Check::new(ID, Outcome::Fail, format!("KVM speaks API version {api_version}, not 12"))
                    .mend("use a kernel with KVM's stable interface (Linux 2.6.22 or newer)".to_owned())
            }
        },
        KvmAccess::Missing => Check::new(
            ID,
            Outcome::Warn,
            "/dev/kvm does not exist: only the synthetic guest runs on this machine; `sterna demo` falls back to it",
        )
        .mend(driver_remedy(kvm, platform)),
        KvmAccess::NoDriver => Check::new(
            ID,
            Outcome::Warn,
            "/dev/kvm exists without a driver: only the synthetic guest runs on this machine",
        )
        .mend(driver_remedy(kvm, platform)),
        KvmAccess::Denied => Check::new(ID, Outcome::Fail, "/dev/kvm exists, but this user may not open it")
            .mend(if platform.container {
                "start the container with --device /dev/kvm --group-add \"$(stat -c %g /dev/kvm)\"".to_owned()
            } else {
                platform.as_root("usermod -aG kvm \"$USER\"") + ", then log in again (or now: newgrp kvm)"
            }),
        KvmAccess::Other(text) => Check::new(ID, Outcome::Fail, format!("/dev/kvm does not open: {text}"))
            .mend(platform.as_root("dmesg | grep -i kvm") + " may say why"),
    }
}

fn driver_remedy(kvm: &KvmReadings, platform: &Platform) -> String {
    match (platform.container, kvm.hardware) {
        (true, _) => "start the container with --device /dev/kvm".to_owned(),
        (_, Some("svm")) => platform.as_root("modprobe kvm_amd"),
        (_, Some(_)) => platform.as_root("modprobe kvm_intel"),
        (_, None) if kvm.x86 => {
            "the processor shows neither vmx nor svm: switch virtualisation on in the firmware, or, \
                                 on a virtual machine, nested virtualisation at its host"
                .to_owned()
        }
        (_, None) => platform.as_root("modprobe kvm"),
    }
}

fn judge_dirty_log(capabilities: KvmCapabilities) -> Check {
    const ID: &str = "kvm.dirty_log";
    const ENABLE: i32 = 1;
    const INITIALLY_SET: i32 = 2;
    let flags = capabilities.manual_dirty_log_protect;
    if flags & ENABLE == 0 {
        return Check::new(ID, Outcome::Fail, "KVM cannot clear its dirty log page by page (manual protect)")
            .mend("use Linux 5.7 or newer".to_owned());
    }
    if flags & INITIALLY_SET == 0 {
        return Check::new(
            ID,
            Outcome::Warn,
            "the dirty log cannot start with all pages set: the first round is slower",
        )
        .mend("use Linux 5.7 or newer".to_owned());
    }
    Check::new(ID, Outcome::Pass, "dirty log with manual protect, initially set")
}

fn judge_hardware(kvm: &KvmReadings) -> Option<Check> {
    const ID: &str = "kvm.hardware";
    match kvm.hardware {
        Some(flag) => Some(Check::new(ID, Outcome::Pass, format!("the processor virtualises ({flag})"))),
        None if kvm.x86 => Some(Check::new(
            ID,
            Outcome::Info,
            "the processor shows neither vmx nor svm: KVM works by software, and guests are slow",
        )),
        None => None,
    }
}

//! Checks of KVM.

use sterna::host::KvmAccess;

use crate::cli::preflight::check::{Check, Outcome};
use crate::cli::preflight::readings::{KvmCapabilities, KvmReadings, Platform};

pub(crate) fn judge(kvm: &KvmReadings, platform: &Platform) -> Vec<Check> {
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

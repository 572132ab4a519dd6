//! KVM, and what the processor says about hardware for it.

use sterna::host::{KvmAccess, Tree};

/// The readings of KVM.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvmReadings {
    /// Whether `/dev/kvm` opens.
    pub(crate) access: KvmAccess,
    /// KVM's answers about itself. They take ioctls, which the VMM makes:
    /// [`Readings::take`](super::Readings::take) leaves None, and the VMM fills it in to have them judged.
    pub(crate) capabilities: Option<KvmCapabilities>,
    /// The processor's flag for hardware virtualisation: `vmx` or `svm`. None on processors other than x86.
    pub(crate) hardware: Option<&'static str>,
    /// Whether the processor is an x86, on which the flag is meaningful.
    pub(crate) x86: bool,
}

/// KVM's answers about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvmCapabilities {
    /// `KVM_GET_API_VERSION`: 12 since Linux 2.6.22.
    pub(crate) api_version: i32,
    /// The flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: 0 before Linux 5.1, 1 before 5.7, 3 since.
    pub(crate) manual_dirty_log_protect: i32,
}

impl KvmReadings {
    pub(crate) fn read(tree: &Tree) -> Self {
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

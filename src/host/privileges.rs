//! What the kernel lets this process do.

use super::tree::{Tree, field};

/// The relevant capabilities of this process. All are false in a user namespace, which grants them in
/// appearance only: the kernel requires them in the initial user namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Privileges {
    /// Effective user id 0.
    pub root: bool,
    /// `CAP_NET_ADMIN`: make network interfaces and RDMA devices.
    pub net_admin: bool,
    /// `CAP_IPC_LOCK`: lock memory past the limit.
    pub ipc_lock: bool,
    /// `CAP_SYS_MODULE`: load kernel modules.
    pub sys_module: bool,
}

impl Privileges {
    /// As the kernel reports them.
    #[must_use]
    pub fn read(tree: &Tree) -> Self {
        let status = tree.text("proc/self/status").unwrap_or_default();
        // Real, effective, saved, file system.
        let root = field(&status, "Uid").and_then(|ids| ids.split_whitespace().nth(1)) == Some("0");
        let effective =
            field(&status, "CapEff").and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
        let holds = |bit: u32| in_initial_user_namespace(tree) && effective >> bit & 1 == 1;
        // Bits of linux/capability.h.
        Self { root, net_admin: holds(12), ipc_lock: holds(14), sys_module: holds(16) }
    }
}

/// The initial user namespace maps all ids to themselves.
fn in_initial_user_namespace(tree: &Tree) -> bool {
    tree.text("proc/self/uid_map").is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

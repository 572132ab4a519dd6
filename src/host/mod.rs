//! Readings of this host that the lanes need, and that the checks of the command use too.

mod kvm;
mod memory;
mod privileges;
mod tree;

pub use self::kvm::{KvmAccess, kvm_access};
pub use self::memory::{
    Memlock, available_memory_bytes, kibibytes, memlock, read_available, read_resident, resident_memory_bytes,
};
pub use self::privileges::Privileges;
pub use self::tree::{Tree, field};

//! How the built-in machine records its vCPUs' writes: the choice, and the adapter for dirty rings.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use sterna::dirty::{
    CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, SoftwareBitmap, SoftwareLog,
};
use sterna_vmm::{
    DirtyRings, MachineConfig, MachineError, MachineKind, RING_ENTRIES_MAX, SharedMachine, new_kvm,
    new_kvm_with_rings, new_synthetic,
};

/// Options for this host alone: each host that the guest moves to has its own choice.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct DirtyLogArgs {
    /// How KVM records the guest's writes
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dirty_log: DirtyLogKind,
    /// Entries of each vCPU's dirty ring: a power of two from 1024 to 65536 [default: 65536]
    #[arg(long, value_name = "N")]
    pub(crate) dirty_ring_entries: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DirtyLogKind {
    /// A bit for each page: the cost of a round grows with the guest's RAM
    #[default]
    Bitmap,
    /// A list for each vCPU: the cost grows with the amount written. For large guests that write little; not
    /// for synthetic ones
    Ring,
}

impl DirtyLogArgs {
    /// Makes a machine of this kind.
    pub(crate) fn new_machine(
        self,
        kind: MachineKind,
        config: MachineConfig,
    ) -> Result<SharedMachine, MachineError> {
        match (self.dirty_log, kind) {
            (DirtyLogKind::Bitmap, _) if self.dirty_ring_entries.is_some() => {
                Err(MachineError::Config("--dirty-ring-entries is for --dirty-log ring".into()))
            }
            (DirtyLogKind::Bitmap, MachineKind::Kvm) => new_kvm(config),
            (DirtyLogKind::Bitmap, MachineKind::Synthetic) => new_synthetic(config),
            (DirtyLogKind::Ring, MachineKind::Kvm) => {
                new_kvm_with_rings(config, self.dirty_ring_entries.unwrap_or(RING_ENTRIES_MAX))
            }
            (DirtyLogKind::Ring, MachineKind::Synthetic) => {
                Err(MachineError::Config("a synthetic machine has no dirty ring".into()))
            }
        }
    }

    /// The same as words of a command line.
    pub(crate) fn words(self) -> Vec<String> {
        let kind = match self.dirty_log {
            DirtyLogKind::Bitmap => "bitmap",
            DirtyLogKind::Ring => "ring",
        };
        let entries = self.dirty_ring_entries.map(|entries| format!("--dirty-ring-entries={entries}"));
        [format!("--dirty-log={kind}")].into_iter().chain(entries).collect()
    }
}

/// The vCPUs' writes from their dirty rings and the VMM's own writes, both by way of the software bitmap.
#[derive(Debug)]
pub(crate) struct RingLog {
    pub(crate) rings: Arc<DirtyRings>,
    pub(crate) software: SoftwareLog<SoftwareBitmap>,
}

impl DirtyLog for RingLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        // First, because a full ring is emptied into the software bitmap.
        self.software.start()?;
        self.rings.watch().map_err(DirtyError::Rings)?;
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        self.software.catch_up()
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        // Collects all rings at once; the pages of other regions stay in the bitmap until their harvest.
        self.rings.collect().map_err(DirtyError::Rings)?;
        self.software.harvest(region, dirty)
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        // Collecting has cleared the pages.
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        let stopped = self.rings.forget().map_err(DirtyError::Rings);
        stopped.and(self.software.stop())
    }
}

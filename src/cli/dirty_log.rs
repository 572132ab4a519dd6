//! How the built-in machine records its vCPUs' writes: the choice, and the adapter for dirty rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    rings: Arc<DirtyRings>,
    software: SoftwareLog<SoftwareBitmap>,
    /// How often rings had been overrun when that was last told.
    overruns_told: AtomicU64,
}

impl RingLog {
    pub(crate) fn new(rings: Arc<DirtyRings>, software: SoftwareLog<SoftwareBitmap>) -> Self {
        let overruns_told = rings.times_overrun().into();
        Self { rings, software, overruns_told }
    }
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

    fn warning(&self) -> Option<String> {
        let overruns = self.rings.times_overrun();
        let before = self.overruns_told.swap(u64::MAX, Ordering::Relaxed);
        if overruns <= before {
            self.overruns_told.store(before, Ordering::Relaxed);
            return None;
        }
        let entries = self.rings.entries();
        let mend = match entries.checked_mul(2).filter(|&larger| larger <= RING_ENTRIES_MAX) {
            Some(larger) => format!("run the guest with --dirty-ring-entries={larger} or more"),
            None => "no ring is larger; run the guest with --dirty-log=bitmap".to_owned(),
        };
        Some(format!(
            "the dirty ring of {entries} entries was overrun, so each page that was ever touched counts as written: \
             {mend}"
        ))
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

    fn peek(&self, uncleared: u64) -> Result<Option<u64>, DirtyError> {
        self.rings.collect().map_err(DirtyError::Rings)?;
        self.software.peek(uncleared)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        let stopped = self.rings.forget().map_err(DirtyError::Rings);
        stopped.and(self.software.stop())
    }
}

//! A quota of pages that each vCPU may write in a second, by QEMU's dirty limit.
//!
//! QEMU counts each second what every limited vCPU wrote, by KVM's dirty rings. So a limit that no vCPU
//! reaches is in force until a lower one is wanted.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::monitor::Monitor;
use crate::page::PAGE_BYTES;
use crate::qmp::QmpError;

/// Whether QEMU knows limits of writes, and has none yet. Without rings it refuses to set one.
pub(crate) fn is_free(monitor: &Monitor) -> Result<bool, QmpError> {
    match monitor.dirty_limits() {
        Ok(limited) => Ok(limited.is_empty()),
        // QEMU 7.1 is the first to have it.
        Err(error) if error.is_no_such_command() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Limits the writes of each vCPU; by more than any writes if `None`.
pub(crate) fn limit(monitor: &Monitor, pages_per_second: Option<NonZeroU64>) -> Result<(), QmpError> {
    let mib = pages_per_second.map_or(NO_LIMIT_MIB, |pages| {
        pages.get().saturating_mul(PAGE_BYTES).div_ceil(1 << 20).clamp(1, NO_LIMIT_MIB)
    });
    monitor.set_dirty_limit(mib)
}

/// More than a vCPU writes in a second, in MiB.
const NO_LIMIT_MIB: u64 = 1 << 20;

/// What the vCPUs wrote.
#[derive(Debug, Default)]
pub(crate) struct WriteQuota(Mutex<Option<Count>>);

#[derive(Debug)]
struct Count {
    at: Instant,
    /// Pages of each vCPU, by its number.
    pages: Vec<u64>,
}

impl WriteQuota {
    /// How many pages each vCPU has written since the first call, from the speeds at the calls.
    pub(crate) fn pages(&self, monitor: &Monitor) -> Result<Vec<u64>, QmpError> {
        let mut vcpus = monitor.dirty_limits()?;
        vcpus.sort_by_key(|vcpu| vcpu.cpu_index);
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let count = count.get_or_insert_with(|| Count { at: now, pages: Vec::new() });
        count.pages.resize(vcpus.len(), 0);
        let milliseconds = u64::try_from((now - count.at).as_millis()).unwrap_or(u64::MAX);
        for (pages, vcpu) in count.pages.iter_mut().zip(&vcpus) {
            let bytes = vcpu.current_rate.saturating_mul(1 << 20).saturating_mul(milliseconds) / 1000;
            *pages = pages.saturating_add(bytes / PAGE_BYTES);
        }
        count.at = now;
        Ok(count.pages.clone())
    }
}

//! The device that receives the guest's beats: it stamps each beat, checks the count, and keeps the journal.

use std::sync::{Mutex, MutexGuard};

use crate::clock::monotonic_ns;
use crate::error::MachineError;
use crate::guest::{beat_page, layout};
use crate::poison::IgnorePoison;
use crate::ram::GuestRam;
use crate::status::Heartbeat;

const LOWER_HALF: u64 = 0xffff_ffff;

/// The heartbeats of all vCPUs.
#[derive(Debug)]
pub(crate) struct HeartbeatDevice {
    vcpus: Vec<Mutex<Heartbeat>>,
}

impl HeartbeatDevice {
    pub(crate) fn new(vcpus: u8) -> Self {
        Self { vcpus: (0..vcpus).map(|_| Mutex::default()).collect() }
    }

    /// Receives a beat of a vCPU; `count_low` is the lower half of its count. A beat of vCPU 0 goes into the
    /// journal before the vCPU runs on.
    pub(crate) fn beat(&self, memory: &GuestRam, vcpu: u8, count_low: u32) -> Result<(), MachineError> {
        let count = {
            let mut heartbeat_device = self.of(vcpu);
            let expected = heartbeat_device.count.wrapping_add(1);
            heartbeat_device.count = if expected & LOWER_HALF == u64::from(count_low) {
                expected
            } else {
                heartbeat_device.regressions += 1;
                (expected & !LOWER_HALF) | u64::from(count_low)
            };
            let now = monotonic_ns();
            if heartbeat_device.first_at_ns == 0 {
                heartbeat_device.first_at_ns = now;
            } else {
                heartbeat_device.longest_gap_ns =
                    heartbeat_device.longest_gap_ns.max(now.saturating_sub(heartbeat_device.at_ns));
            }
            heartbeat_device.at_ns = now;
            heartbeat_device.count
        };
        if vcpu == 0 {
            let guest_address = layout::JOURNAL;
            beat_page::write(memory, count)
                .map_err(|source| MachineError::GuestAddress { guest_address, source })?;
        }
        Ok(())
    }

    pub(crate) fn heartbeat(&self, vcpu: u8) -> Heartbeat {
        *self.of(vcpu)
    }

    /// The count of each vCPU, for continuing on another host.
    pub(crate) fn counts(&self) -> Vec<u64> {
        (0u8..).take(self.vcpus.len()).map(|vcpu| self.of(vcpu).count).collect()
    }

    /// Continues from these counts.
    pub(crate) fn adopt(&self, counts: &[u64]) {
        for (vcpu, &count) in (0u8..).zip(counts) {
            *self.of(vcpu) = Heartbeat { count, ..Heartbeat::default() };
        }
    }

    fn of(&self, vcpu: u8) -> MutexGuard<'_, Heartbeat> {
        self.vcpus[usize::from(vcpu)].lock().ignore_poison()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MachineConfig, Workload};
    use crate::memory::guest_ram;

    #[test]
    fn a_count_that_skips_or_repeats_is_a_regression() {
        let workload = Workload { working_set_bytes: 0, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
        let config = MachineConfig { memory_bytes: 16 << 20, vcpus: 1, hugepages: None, workload };
        let memory = guest_ram(&config).unwrap();
        let heartbeat_device = HeartbeatDevice::new(1);
        for (count, regressions) in [(1, 0), (2, 0), (2, 1), (3, 1), (5, 2), (6, 2)] {
            heartbeat_device.beat(&memory, 0, count).unwrap();
            assert_eq!(heartbeat_device.heartbeat(0).count, u64::from(count));
            assert_eq!(heartbeat_device.heartbeat(0).regressions, regressions);
        }
        heartbeat_device.adopt(&[u64::from(u32::MAX)]);
        heartbeat_device.beat(&memory, 0, 0).unwrap();
        assert_eq!(heartbeat_device.heartbeat(0).count, 1 << 32, "the count is wider than the port");
        assert_eq!(heartbeat_device.heartbeat(0).regressions, 0);
    }
}

//! A quota of written pages beside a share of the time: two KVM guests in turn, with a vCPU that sweeps over
//! memory and one that writes a single page again and again. Both are slowed until the same number of pages
//! is dirty in each second, and then the work of each vCPU counts.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sterna_vmm::{
    DirtyRings, DirtyTracking, MachineConfig, RING_ENTRIES_MAX, SharedMachine, Workload, new_kvm_with_rings,
};
use vm_memory::GuestMemoryBackend;

use super::error::BenchError;

const MIB: u64 = 1 << 20;
/// The harvests of a round after another.
const HARVEST_EVERY: Duration = Duration::from_millis(500);
const HARVESTS: u32 = 8;
/// How near the dirty rates are to be, and how often a share of the time is tried for that.
const NEAR: f64 = 0.05;
const TRIES: u32 = 8;

/// The shares of what the guest writes at full speed that are left to it.
const SHARES: [f64; 3] = [0.5, 0.2, 0.05];

/// Prints the table; one line if this host has no KVM with dirty rings.
pub(super) fn run() -> Result<(), BenchError> {
    println!("a quota of pages beside a share of the time, one vCPU of two sweeps (as shares of full speed)");
    let workload =
        Workload { working_set_bytes: 64 * MIB, rate_mb_per_s: 100_000, prefill: true, sweepers: 1 };
    let config = MachineConfig { memory_bytes: 128 * MIB, vcpus: 2, hugepages: None, workload };
    let machine = match new_kvm_with_rings(config, RING_ENTRIES_MAX) {
        Ok(machine) => machine,
        Err(error) => {
            println!("  no figure: {error}");
            return Ok(());
        }
    };
    let guest = Guest::start(machine)?;
    println!("  new pages: asked, quota, time   sweeps: quota, time   other: quota, time   time %");
    for share in SHARES {
        // Before and after, because the speed of a shared machine changes.
        let full = guest.measure()?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let pages = NonZeroU64::new((full.new_pages * share) as u64);
        guest.machine.limit_writes(pages)?;
        let quota = guest.measure()?;
        guest.machine.limit_writes(None)?;
        let (percent, time) = guest.by_time(quota.new_pages / full.new_pages, quota.new_pages)?;
        let again = guest.measure()?;
        let full = full.mean(&again);
        println!(
            "  {share:>16.2} {:>6.3} {:>5.3} {:>15.3} {:>5.3} {:>14.3} {:>5.3} {percent:>8}",
            quota.new_pages / full.new_pages,
            time.new_pages / full.new_pages,
            quota.work[0] / full.work[0],
            time.work[0] / full.work[0],
            quota.work[1] / full.work[1],
            time.work[1] / full.work[1],
        );
    }
    println!("  rings overrun: {} times\n", guest.rings.times_overrun());
    Ok(())
}

/// What happened in a second.
#[derive(Debug)]
struct Speeds {
    /// Pages that were dirty at the harvests.
    new_pages: f64,
    /// Pages that each vCPU wrote, however often.
    work: [f64; 2],
}

impl Speeds {
    fn mean(&self, other: &Self) -> Self {
        Self {
            new_pages: f64::midpoint(self.new_pages, other.new_pages),
            work: [0, 1].map(|vcpu| f64::midpoint(self.work[vcpu], other.work[vcpu])),
        }
    }
}

/// A guest under way.
struct Guest {
    machine: SharedMachine,
    rings: Arc<DirtyRings>,
}

impl Guest {
    fn start(machine: SharedMachine) -> Result<Self, BenchError> {
        let DirtyTracking::Rings(rings) = machine.dirty_tracking() else { return Err(BenchError::NoRings) };
        machine.start()?;
        rings.watch()?;
        Ok(Self { machine, rings })
    }

    fn measure(&self) -> Result<Speeds, BenchError> {
        // What the change of the limit left.
        thread::sleep(Duration::from_millis(300));
        self.harvest()?;
        let written =
            || self.machine.status().vcpus.iter().map(|vcpu| vcpu.pages_written).collect::<Vec<_>>();
        let (before, began, mut new_pages) = (written(), Instant::now(), 0);
        for _ in 0..HARVESTS {
            thread::sleep(HARVEST_EVERY);
            new_pages += self.harvest()?;
        }
        let (after, seconds) = (written(), began.elapsed().as_secs_f64());
        Ok(Speeds {
            new_pages: new_pages as f64 / seconds,
            work: [0, 1].map(|vcpu| after[vcpu].saturating_sub(before[vcpu]) as f64 / seconds),
        })
    }

    /// The percentage of the time at which as many pages become dirty, and the speeds then.
    fn by_time(&self, share: f64, new_pages: f64) -> Result<(u8, Speeds), BenchError> {
        let (mut low, mut high) = (1u8, 99u8);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 99")]
        let mut percent = (100.0 * (1.0 - share)).clamp(1.0, 99.0) as u8;
        let mut nearest: Option<(f64, u8, Speeds)> = None;
        for _ in 0..TRIES {
            self.machine.throttle(percent)?;
            let speeds = self.measure()?;
            let off = (speeds.new_pages / new_pages).ln().abs();
            if speeds.new_pages > new_pages {
                low = percent + 1;
            } else {
                high = percent - 1;
            }
            if nearest.as_ref().is_none_or(|&(least, ..)| off < least) {
                nearest = Some((off, percent, speeds));
            }
            if off < NEAR || low > high {
                break;
            }
            percent = u8::midpoint(low, high);
        }
        self.machine.throttle(0)?;
        let (_, percent, speeds) = nearest.ok_or(BenchError::NoRings)?;
        Ok((percent, speeds))
    }

    fn harvest(&self) -> Result<u64, BenchError> {
        self.rings.collect()?;
        let pages = self
            .machine
            .memory()
            .iter()
            .map(|region| {
                let mut pages = 0;
                region.get_mmap().bitmap().take(|_, word| pages += u64::from(word.count_ones()));
                pages
            })
            .sum();
        Ok(pages)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.machine.stop();
    }
}

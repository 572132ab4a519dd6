//! A machine without KVM: threads that write to the RAM as the guest would.
//!
//! They follow the same control pages, write the same pattern as the payload, and beat on the same heartbeat
//! device. They keep all their state in guest RAM, so RAM is nearly the whole of the machine's state. Their
//! writes go through vm-memory and so into the software bitmap.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::clock::monotonic_ns;
use crate::config::{MachineConfig, MachineKind};
use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::guest::control::{self, ControlPage};
use crate::guest::layout::{PageRun, control_page, page_numbers, pages_of};
use crate::guest::{beat_page, pattern};
use crate::machine::{DirtyTracking, SharedMachine};
use crate::machine_core::{Engine, MachineCore};
use crate::memory::read_page;
use crate::platform::Platform;
use crate::ram::PAGE_BYTES;
use crate::vcpu_threads::{Then, VcpuThreads};

/// The synthetic machine's time stamp counter counts nanoseconds.
const TSC_KHZ: u32 = 1_000_000;

/// Makes a synthetic machine. Its RAM is untouched.
///
/// # Errors
/// [`MachineError::Config`] for a configuration that no machine can have, [`MachineError::Memory`] when the
/// host has not that much RAM to give.
pub fn new_synthetic(config: MachineConfig) -> Result<SharedMachine, MachineError> {
    let engine = Synthetic { cpu: CpuDescription::synthetic() };
    Ok(Arc::new(MachineCore::new(Platform::new(config)?, VcpuThreads::new(None), engine)))
}

#[derive(Debug)]
struct Synthetic {
    cpu: CpuDescription,
}

/// Empty: the control pages hold all of the state.
#[derive(Debug, Serialize, Deserialize)]
struct SyntheticState;

impl Engine for Synthetic {
    type State = SyntheticState;

    const KIND: MachineKind = MachineKind::Synthetic;

    fn cpu(&self) -> &CpuDescription {
        &self.cpu
    }

    fn dirty_tracking(&self) -> DirtyTracking<'_> {
        DirtyTracking::SoftwareOnly
    }

    fn console(&self) -> Vec<u8> {
        Vec::new()
    }

    fn prepare(&self, platform: &Platform) -> Result<(), MachineError> {
        platform.prepare(TSC_KHZ)
    }

    fn work(
        &self,
        vcpu: u8,
        platform: Arc<Platform>,
        vcpu_threads: Arc<VcpuThreads>,
    ) -> Box<dyn FnOnce() -> Result<(), String> + Send> {
        Box::new(move || {
            let worker = Worker {
                vcpu,
                platform: &platform,
                vcpu_threads: &vcpu_threads,
                control: platform.control(vcpu),
            };
            match worker.run() {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        })
    }

    fn save(&self) -> Result<Self::State, MachineError> {
        Ok(SyntheticState)
    }

    fn check(&self, SyntheticState: &Self::State, _board: &Platform) -> Result<(), MachineError> {
        Ok(())
    }

    fn load(&self, SyntheticState: &Self::State, platform: &Platform) -> Result<(), MachineError> {
        platform.vcpus().try_for_each(|vcpu| platform.control(vcpu).adopt_tsc(TSC_KHZ))
    }
}

/// The thread of one synthetic vCPU.
struct Worker<'a> {
    vcpu: u8,
    platform: &'a Platform,
    vcpu_threads: &'a VcpuThreads,
    control: ControlPage<'a>,
}

/// Breaks when the thread has to leave.
type Flow = Result<ControlFlow<()>, MachineError>;

impl Worker<'_> {
    /// Ticks, as the payload does: check on request, beat, write what the rate allows, sleep until the next
    /// tick.
    fn run(&self) -> Flow {
        let mut tick_start = monotonic_ns();
        let mut credit = 0;
        loop {
            if self.answer()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            self.beat()?;
            let pages_per_tick = self.control.get(control::PAGES_PER_TICK)?;
            let pages = if pages_per_tick == 0 {
                self.control.get(control::TARGET)?.saturating_sub(self.control.get(control::PROGRESS)?)
            } else {
                credit = pages_per_tick.saturating_add(credit);
                credit >> 32
            };
            credit &= u64::from(u32::MAX);
            if self.sweep(pages)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let tick = self.control.get(control::TICK_TSC)?;
            tick_start = self.sleep_till(tick_start.saturating_add(tick), tick);
        }
    }

    /// Sleeps until `due`, or not at all when late; returns when the next tick begins.
    fn sleep_till(&self, due: u64, tick: u64) -> u64 {
        let now = self.vcpu_threads.sleep_till(due);
        if now.saturating_sub(due) > tick.saturating_mul(4) { now } else { due }
    }

    fn sweep(&self, pages: u64) -> Flow {
        if pages == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        let share = self.share()?;
        let total = pages_of(&share).max(1);
        let mut next_beat = monotonic_ns().saturating_add(self.control.get(control::TICK_TSC)?);
        for _ in 0..pages {
            let progress = self.control.get(control::PROGRESS)?;
            let page = nth_page(&share, progress % total);
            self.write(page, (progress / total).saturating_add(1))?;
            self.control.set(control::PROGRESS, progress.wrapping_add(1))?;
            if self.answer()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            if monotonic_ns() >= next_beat {
                self.beat()?;
                next_beat = monotonic_ns().saturating_add(self.control.get(control::TICK_TSC)?);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Between two pages: stand still when ordered, check on request.
    fn answer(&self) -> Flow {
        if self.vcpu_threads.wanted() && self.vcpu_threads.wait() == Then::Leave {
            return Ok(ControlFlow::Break(()));
        }
        let request = self.control.get(control::CHECK_REQUEST)?;
        if request == self.control.get(control::CHECK_DONE)? {
            return Ok(ControlFlow::Continue(()));
        }
        self.check(request)
    }

    fn write(&self, page: u64, generation: u64) -> Result<(), MachineError> {
        for block in 0..pattern::BLOCKS {
            let guest_address =
                page.saturating_mul(PAGE_BYTES) | pattern::offset_bytes(page, generation, block);
            self.platform
                .memory
                .store(pattern::word(page, generation, block), GuestAddress(guest_address), Ordering::Release)
                .map_err(|source| MachineError::GuestAddress { guest_address, source })?;
        }
        Ok(())
    }

    fn beat(&self) -> Result<(), MachineError> {
        let beats = self.control.get(control::BEATS)?.wrapping_add(1);
        self.control.set(control::BEATS, beats)?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the port of the real guest is 32 bits wide, too"
        )]
        let count_low = beats as u32;
        self.platform.heartbeat_device.beat(&self.platform.memory, self.vcpu, count_low)
    }

    /// The payload's check: the words of the latest generation in each page, and on vCPU 0 the journal.
    fn check(&self, request: u64) -> Flow {
        let mut findings = Findings { pages: 0, wrong: 0, first_wrong: control::NO_PAGE };
        let share = self.share()?;
        let progress = self.control.get(control::PROGRESS)?;
        let total = pages_of(&share).max(1);
        let (generation, next) = ((progress / total).saturating_add(1), progress % total);
        findings.note(control_page(self.vcpu) / PAGE_BYTES, true);
        for (index, page) in (0..).zip(page_numbers(&share)) {
            if self.vcpu_threads.wanted() && self.vcpu_threads.wait() == Then::Leave {
                return Ok(ControlFlow::Break(()));
            }
            let generation = if index < next { generation } else { generation - 1 };
            let content = read_page(&self.platform.memory, page)?;
            let newest_is_right = (0..pattern::BLOCKS).all(|block| {
                let position =
                    usize::try_from(pattern::offset_bytes(page, generation, block) / 8).unwrap_or(0);
                content[position] == pattern::word(page, generation, block)
            });
            findings.note(page, newest_is_right);
            if index % 64 == 63 {
                self.beat()?;
            }
        }
        if self.vcpu == 0 {
            let beats = self.control.get(control::BEATS)?;
            for index in 0..beat_page::PAGES {
                let page = beat_page::page_number(index);
                findings
                    .note(page, beat_page::is_right(&read_page(&self.platform.memory, page)?, index, beats));
            }
        }
        self.control.set(control::CHECK_PAGES, findings.pages)?;
        self.control.set(control::CHECK_WRONG, findings.wrong)?;
        self.control.set(control::CHECK_FIRST_WRONG, findings.first_wrong)?;
        self.control.set(control::CHECK_DONE, request)?;
        Ok(ControlFlow::Continue(()))
    }

    fn share(&self) -> Result<[PageRun; 2], MachineError> {
        let run = |address, pages| -> Result<_, MachineError> {
            Ok(PageRun { first: self.control.get(address)? / PAGE_BYTES, pages: self.control.get(pages)? })
        };
        Ok([
            run(control::FIRST_ADDRESS, control::FIRST_PAGES)?,
            run(control::SECOND_ADDRESS, control::SECOND_PAGES)?,
        ])
    }
}

struct Findings {
    pages: u64,
    wrong: u64,
    first_wrong: u64,
}

impl Findings {
    fn note(&mut self, page: u64, right: bool) {
        self.pages += 1;
        if !right {
            self.wrong += 1;
            self.first_wrong = self.first_wrong.min(page.saturating_mul(PAGE_BYTES));
        }
    }
}

fn nth_page(share: &[PageRun; 2], index: u64) -> u64 {
    let [first, second] = share;
    if index < first.pages {
        first.first.saturating_add(index)
    } else {
        second.first.saturating_add(index - first.pages)
    }
}

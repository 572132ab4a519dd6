//! The parts that both kinds of machine share: RAM with a guest's layout, the heartbeat device, and the two
//! checks.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::config::{MachineConfig, Workload};
use crate::error::MachineError;
use crate::guest::control::{self, ControlPage};
use crate::guest::layout::{self, WorkingSet, page_numbers, pages_of};
use crate::guest::{beat_page, pattern};
use crate::heartbeat_device::HeartbeatDevice;
use crate::memory::{guest_ram, populate, read_page};
use crate::poison::IgnorePoison;
use crate::ram::{GuestRam, PAGE_BYTES};
use crate::status::{GuestCheck, VcpuStatus};

/// RAM and the guest's layout in it.
#[derive(Debug)]
pub(crate) struct Platform {
    pub(crate) config: MachineConfig,
    pub(crate) memory: GuestRam,
    pub(crate) heartbeat_device: HeartbeatDevice,
    working_set: WorkingSet,
    /// One check from inside at a time, because guest RAM holds the numbers of their requests.
    checking: Mutex<()>,
}

impl Platform {
    /// Reserves RAM without touching it.
    pub(crate) fn new(config: MachineConfig) -> Result<Self, MachineError> {
        validate(&config)?;
        let memory = guest_ram(&config)?;
        let heartbeat_device = HeartbeatDevice::new(config.vcpus);
        let working_set = WorkingSet::of(&config);
        Ok(Self { config, memory, heartbeat_device, working_set, checking: Mutex::new(()) })
    }

    pub(crate) fn vcpus(&self) -> std::ops::Range<u8> {
        0..self.config.vcpus
    }

    pub(crate) fn control(&self, vcpu: u8) -> ControlPage<'_> {
        ControlPage::new(&self.memory, vcpu)
    }

    /// Writes the control pages and, if asked for, the first generation of the pattern.
    pub(crate) fn prepare(&self, tsc_khz: u32) -> Result<(), MachineError> {
        let workload = &self.config.workload;
        for vcpu in self.vcpus() {
            let share = self.working_set.share(vcpu);
            self.control(vcpu).prepare(&share, workload, self.config.vcpus, tsc_khz)?;
            if workload.prefill {
                share.into_iter().for_each(|run| populate(&self.memory, run));
                page_numbers(&share).try_for_each(|page| self.prefill(page))?;
            }
        }
        Ok(())
    }

    fn prefill(&self, page: u64) -> Result<(), MachineError> {
        let mut content = [0; pattern::PAGE_WORDS * 8];
        for block in 0..pattern::BLOCKS {
            let offset = usize::try_from(pattern::offset_bytes(page, 1, block)).unwrap_or(0);
            content[offset..offset + 8].copy_from_slice(&pattern::word(page, 1, block).to_le_bytes());
        }
        let guest_address = page * PAGE_BYTES;
        self.memory
            .write_slice(&content, GuestAddress(guest_address))
            .map_err(|source| MachineError::GuestAddress { guest_address, source })
    }

    pub(crate) fn vcpu_status(&self, vcpu: u8) -> VcpuStatus {
        let control = self.control(vcpu);
        // The control pages lie within every RAM size, so these reads cannot fail.
        let read = |offset| control.get(offset).unwrap_or(0);
        VcpuStatus {
            heartbeat: self.heartbeat_device.heartbeat(vcpu),
            pages_written: read(control::PROGRESS),
            pages: pages_of(&self.working_set.share(vcpu)),
            timer_interrupts: read(control::TIMER_INTERRUPTS),
            pit_interrupts: read(control::PIT_INTERRUPTS),
        }
    }

    /// Reads every page of the working set, the journal and the control pages. No vCPU may be running.
    pub(crate) fn check_from_outside(&self) -> Result<GuestCheck, MachineError> {
        let mut check = GuestCheck::default();
        for vcpu in self.vcpus() {
            let control = self.control(vcpu);
            note(&mut check, layout::control_page(vcpu) / PAGE_BYTES, self.control_is_right(vcpu)?);
            let share = self.working_set.share(vcpu);
            let progress = control.get(control::PROGRESS)?;
            let pages = pages_of(&share).max(1);
            let (generation, next) = ((progress / pages).saturating_add(1), progress % pages);
            for (index, page) in (0..).zip(page_numbers(&share)) {
                let content = read_page(&self.memory, page)?;
                let right = if index < next {
                    pattern::is_whole(&content, page, generation)
                } else if index > next {
                    pattern::is_whole(&content, page, generation - 1)
                } else {
                    pattern::is_part_way(&content, page, generation)
                };
                note(&mut check, page, right);
            }
        }
        let beats = self.heartbeat_device.heartbeat(0).count;
        for index in 0..beat_page::PAGES {
            let page = beat_page::page_number(index);
            note(&mut check, page, beat_page::is_right(&read_page(&self.memory, page)?, index, beats));
        }
        Ok(check)
    }

    /// Whether the guest's count of beats and its share of pages equal the VMM's. The guest may have counted
    /// a beat that the VMM has not received yet.
    fn control_is_right(&self, vcpu: u8) -> Result<bool, MachineError> {
        let control = self.control(vcpu);
        let [first, second] = self.working_set.share(vcpu);
        let unseen = control.get(control::BEATS)?.wrapping_sub(self.heartbeat_device.heartbeat(vcpu).count);
        Ok(unseen <= 1
            && control.get(control::INDEX)? == u64::from(vcpu)
            && control.get(control::FIRST_ADDRESS)? == first.address()
            && control.get(control::FIRST_PAGES)? == first.pages
            && control.get(control::SECOND_ADDRESS)? == second.address()
            && control.get(control::SECOND_PAGES)? == second.pages)
    }

    /// Makes every vCPU check its pages and waits for the findings. `alive` returns an error once waiting is
    /// in vain.
    pub(crate) fn check_from_inside(
        &self,
        timeout: Duration,
        alive: impl Fn() -> Result<(), MachineError>,
    ) -> Result<GuestCheck, MachineError> {
        let _one_at_a_time = self.checking.lock().ignore_poison();
        // A timeout too long for the clock counts as none.
        let deadline = Instant::now().checked_add(timeout);
        let mut waiting = Vec::new();
        for vcpu in self.vcpus() {
            let control = self.control(vcpu);
            let request = control.get(control::CHECK_REQUEST)?.wrapping_add(1);
            control.set(control::CHECK_REQUEST, request)?;
            waiting.push((control, request));
        }
        let mut check = GuestCheck::default();
        while !waiting.is_empty() {
            alive()?;
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let mut still = Vec::new();
            for (control, request) in waiting {
                if control.get(control::CHECK_DONE)? != request {
                    still.push((control, request));
                    continue;
                }
                check.pages = check.pages.saturating_add(control.get(control::CHECK_PAGES)?);
                check.wrong = check.wrong.saturating_add(control.get(control::CHECK_WRONG)?);
                let first_wrong = control.get(control::CHECK_FIRST_WRONG)?;
                if first_wrong != control::NO_PAGE {
                    check.first_wrong.get_or_insert(first_wrong);
                }
            }
            waiting = still;
            if late && !waiting.is_empty() {
                return Err(MachineError::Timeout {
                    doing: "check its memory",
                    timeout,
                    missing: waiting.len(),
                });
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(check)
    }
}

fn note(check: &mut GuestCheck, page: u64, right: bool) {
    check.pages += 1;
    if !right {
        check.wrong += 1;
        check.first_wrong.get_or_insert(page * PAGE_BYTES);
    }
}

fn validate(config: &MachineConfig) -> Result<(), MachineError> {
    let MachineConfig { memory_bytes, vcpus, hugepages, ref workload } = *config;
    let problem = if !memory_bytes.is_multiple_of(PAGE_BYTES) {
        format!("{memory_bytes} bytes of RAM are no multiple of 4 KiB")
    } else if !(layout::MEMORY_BYTES_MIN..=layout::MEMORY_BYTES_MAX).contains(&memory_bytes) {
        format!("{memory_bytes} bytes of RAM are not between 16 MiB and 511 GiB")
    } else if vcpus == 0 || vcpus > layout::VCPUS_MAX {
        format!("{vcpus} vCPUs are not between 1 and {}", layout::VCPUS_MAX)
    } else if let Some(size) = hugepages
        && !memory_bytes.is_multiple_of(size.bytes())
    {
        format!("{memory_bytes} bytes of RAM are no multiple of the huge page size, {} bytes", size.bytes())
    } else if workload.working_set_bytes > Workload::largest_bytes(memory_bytes) {
        format!(
            "a working set of {} bytes does not fit: with {memory_bytes} bytes of RAM at most {} are free for it",
            workload.working_set_bytes,
            Workload::largest_bytes(memory_bytes)
        )
    } else {
        return Ok(());
    };
    Err(MachineError::Config(problem))
}

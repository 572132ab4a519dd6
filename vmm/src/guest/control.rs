//! The control page of a vCPU: the VMM's orders to the guest, and the guest's reports to the VMM.
//!
//! One page of guest RAM for each vCPU, made of 64-bit words at the offsets below. The payload uses the same
//! constants.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use crate::config::Workload;
use crate::error::MachineError;
use crate::guest::layout::{PageRun, control_page, pages_of};
use crate::ram::{GuestRam, PAGE_BYTES};

// Written by the VMM, read by the guest.
/// The vCPU's number.
pub(crate) const INDEX: u64 = 0x00;
/// The vCPU's pages: address and number of pages of the two runs.
pub(crate) const FIRST_ADDRESS: u64 = 0x08;
pub(crate) const FIRST_PAGES: u64 = 0x10;
pub(crate) const SECOND_ADDRESS: u64 = 0x18;
pub(crate) const SECOND_PAGES: u64 = 0x20;
/// The length of a tick in units of the time stamp counter.
pub(crate) const TICK_TSC: u64 = 0x28;
/// Pages to write in a tick, 32.32 fixed point; 0: write until `PROGRESS` is `TARGET`.
pub(crate) const PAGES_PER_TICK: u64 = 0x30;
pub(crate) const TARGET: u64 = 0x38;
/// The first generation to write.
pub(crate) const FIRST_GENERATION: u64 = 0x40;
/// The number of the latest requested check.
pub(crate) const CHECK_REQUEST: u64 = 0x48;

// Written by the guest, read by the VMM.
/// Pages written so far, over all passes. The guest stores it once a page, after the page. Pass and position
/// follow from it.
pub(crate) const PROGRESS: u64 = 0x80;
/// Beats so far.
pub(crate) const BEATS: u64 = 0x88;
/// The number of the latest finished check, and its findings.
pub(crate) const CHECK_DONE: u64 = 0x90;
pub(crate) const CHECK_PAGES: u64 = 0x98;
pub(crate) const CHECK_WRONG: u64 = 0xa0;
/// The address of the first wrong page, or `NO_PAGE`.
pub(crate) const CHECK_FIRST_WRONG: u64 = 0xa8;
/// Interrupts taken from the local APIC timer and from the PIT.
pub(crate) const TIMER_INTERRUPTS: u64 = 0xb0;
pub(crate) const PIT_INTERRUPTS: u64 = 0xb8;

// The guest's own words.
/// Whether the timer has fired since it was set.
pub(crate) const TIMER_FIRED: u64 = 0xc0;
/// The part of a page that the rate still owes, 0.32 fixed point.
pub(crate) const CREDIT: u64 = 0xc8;
/// When the current tick began, and when the next beat is due at the latest.
pub(crate) const TICK_START: u64 = 0xd0;
pub(crate) const NEXT_BEAT: u64 = 0xd8;

pub(crate) const NO_PAGE: u64 = u64::MAX;

/// The length of a tick. The first is for vCPU 0 of a guest that writes at a rate: its beats show how much
/// the guest is slowed and how long it stood still. The second is for all other vCPUs: their beats only show
/// that they live, and an idle guest should cost its host next to nothing.
const TICK_US: u64 = 2_000;
const QUIET_TICK_US: u64 = 10_000;
/// More pages a tick than any host can write; keeps the fixed-point arithmetic in range.
const PAGES_PER_TICK_MAX: u64 = 1 << 30;

/// The control page of one vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ControlPage<'a> {
    memory: &'a GuestRam,
    vcpu: u8,
}

impl<'a> ControlPage<'a> {
    pub(crate) fn new(memory: &'a GuestRam, vcpu: u8) -> Self {
        Self { memory, vcpu }
    }

    pub(crate) fn get(&self, offset: u64) -> Result<u64, MachineError> {
        let guest_address = control_page(self.vcpu) + offset;
        self.memory
            .load(GuestAddress(guest_address), Ordering::Acquire)
            .map_err(|source| MachineError::GuestAddress { guest_address, source })
    }

    pub(crate) fn set(&self, offset: u64, value: u64) -> Result<(), MachineError> {
        let guest_address = control_page(self.vcpu) + offset;
        self.memory
            .store(value, GuestAddress(guest_address), Ordering::Release)
            .map_err(|source| MachineError::GuestAddress { guest_address, source })
    }

    /// Writes the orders for a vCPU of a fresh machine. The rate is split evenly over `vcpus`.
    pub(crate) fn prepare(
        &self,
        share: &[PageRun; 2],
        workload: &Workload,
        vcpus: u8,
        tsc_khz: u32,
    ) -> Result<(), MachineError> {
        let pages = pages_of(share);
        let prefilled = if workload.prefill { pages } else { 0 };
        let rate_mb_per_s = if pages == 0 { 0 } else { workload.rate_mb_per_s };
        let tick_us = self.tick_us(rate_mb_per_s == 0);
        for (offset, value) in [
            (INDEX, u64::from(self.vcpu)),
            (FIRST_ADDRESS, share[0].address()),
            (FIRST_PAGES, share[0].pages),
            (SECOND_ADDRESS, share[1].address()),
            (SECOND_PAGES, share[1].pages),
            (TICK_TSC, tick_tsc(tick_us, tsc_khz)),
            (PAGES_PER_TICK, pages_per_tick(rate_mb_per_s, vcpus, tick_us)),
            (TARGET, pages),
            (FIRST_GENERATION, if workload.prefill { 2 } else { 1 }),
            (PROGRESS, prefilled),
        ] {
            self.set(offset, value)?;
        }
        Ok(())
    }

    /// Sets this host's TSC rate for a vCPU that arrived from another host.
    pub(crate) fn adopt_tsc(&self, tsc_khz: u32) -> Result<(), MachineError> {
        let tick_tsc = tick_tsc(self.tick_us(self.get(PAGES_PER_TICK)? == 0), tsc_khz);
        if self.get(TICK_TSC)? == tick_tsc { Ok(()) } else { self.set(TICK_TSC, tick_tsc) }
    }

    fn tick_us(&self, idle: bool) -> u64 {
        if self.vcpu == 0 && !idle { TICK_US } else { QUIET_TICK_US }
    }
}

fn tick_tsc(tick_us: u64, tsc_khz: u32) -> u64 {
    u64::from(tsc_khz) * tick_us / 1000
}

fn pages_per_tick(rate_mb_per_s: u64, vcpus: u8, tick_us: u64) -> u64 {
    // MB/s is bytes/µs, so this is bytes in a tick, as 32.32 fixed point.
    let bytes = (u128::from(rate_mb_per_s) * u128::from(tick_us)) << 32;
    let pages = bytes / u128::from(PAGE_BYTES) / u128::from(vcpus);
    // A rate too small for the fixed point is still a rate, not "once".
    let least = rate_mb_per_s.min(1);
    u64::try_from(pages).unwrap_or(u64::MAX).clamp(least, PAGES_PER_TICK_MAX << 32)
}

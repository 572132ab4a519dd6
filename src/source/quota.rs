//! The quota of the guest's writes: what each vCPU writes, and what the quota takes from it.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use crate::convergence::WriteShares;
use crate::guest::{GuestError, SourceGuest, VcpuWrites, WriteQuota};
use crate::memory::PAGE_BYTES;
use crate::panics::{Panicked, caught};

/// A limit of the guest's writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WriteLimit {
    /// Bytes a second of all vCPUs together.
    pub(super) bytes_per_second: f64,
    /// Pages a second of each vCPU.
    each: NonZeroU64,
}

impl WriteLimit {
    /// The limit by which all vCPUs together write so many bytes a second, which is this share of what they
    /// write at full speed.
    pub(super) fn of(bytes_per_second: f64, of_all: f64, shares: &WriteShares) -> Self {
        let each = bytes_per_second * shares.quota(of_all) / of_all;
        #[expect(clippy::cast_precision_loss, reason = "a page is small")]
        let pages = (each / PAGE_BYTES as f64).ceil();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        let each = NonZeroU64::new(pages as u64).unwrap_or(NonZeroU64::MIN);
        Self { bytes_per_second, each }
    }

    pub(super) fn mbps(&self) -> f64 {
        self.bytes_per_second / 1e6
    }
}

/// Sets or ends the quota; returns whether the VMM did so. `Ok` if it has none and none is to be set.
pub(super) fn limit(guest: &dyn SourceGuest, limit: Option<WriteLimit>) -> Result<(), String> {
    let each = limit.map(|limit| limit.each);
    let set = || match guest.write_quota() {
        Some(quota) => quota.limit(each),
        None if each.is_none() => Ok(()),
        None => Err(GuestError::new("the VMM has no quota of writes any more")),
    };
    match caught(set) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(Panicked(text)) => Err(format!("the VMM panicked: {text}")),
    }
}

/// Reads what the vCPUs wrote, from time to time.
#[derive(Debug, Default)]
pub(super) struct QuotaMeter {
    last: Option<(Instant, Vec<VcpuWrites>)>,
    /// What each vCPU wrote when the guest last ran at full speed for a round.
    at_full_speed: Vec<u64>,
    /// The VMM failed to limit or to count.
    pub(super) has_failed: bool,
}

/// What the vCPUs did since the reading before.
pub(super) struct Reading {
    time: Duration,
    pages: Vec<u64>,
    /// How long each stood still, if that is measured.
    stood: Option<Vec<Duration>>,
}

impl QuotaMeter {
    /// Whether the VMM says how long vCPUs stood still.
    pub(super) fn measures_time(&self) -> bool {
        self.last.as_ref().is_some_and(|(_, writes)| writes.iter().all(|vcpu| vcpu.stood_still.is_some()))
    }

    /// What the vCPUs did since the reading before, if the guest has a quota and this is not the first one.
    pub(super) fn read(&mut self, guest: &dyn SourceGuest) -> Option<Reading> {
        if self.has_failed {
            return None;
        }
        let why = match caught(|| guest.write_quota().map(WriteQuota::writes).transpose()) {
            Ok(Ok(writes)) => {
                let (now, writes) = (Instant::now(), writes?);
                let (then, before) = self.last.replace((now, writes.clone()))?;
                return Some(Reading::between(&before, &writes, now - then));
            }
            Ok(Err(error)) => error.to_string(),
            Err(Panicked(text)) => format!("the VMM panicked: {text}"),
        };
        tracing::warn!("the guest's writes cannot be told apart by vCPU: {why}");
        self.has_failed = true;
        None
    }

    /// The spread of the writes in a round at full speed; `None` if nothing was written.
    pub(super) fn spread(&mut self, reading: &Reading) -> Option<WriteShares> {
        if reading.pages.iter().all(|&pages| pages == 0) {
            return None;
        }
        self.at_full_speed.clone_from(&reading.pages);
        Some(WriteShares::of(&reading.pages))
    }

    /// By how many percent the quota slowed the guest's writes, each vCPU as far as it writes.
    pub(super) fn slowed_percent(&self, reading: &Reading) -> Option<u8> {
        let stood = reading.stood.as_ref()?;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let weights = self.at_full_speed.iter().map(|&pages| pages as f64);
        let (mut slowed, mut all) = (0.0, 0.0);
        for (weight, stood) in weights.zip(stood) {
            slowed += weight * stood.as_secs_f64();
            all += weight;
        }
        let share = slowed / (all * reading.time.as_secs_f64());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 99")]
        share.is_finite().then(|| (share * 100.0).round().clamp(0.0, 99.0) as u8)
    }
}

impl Reading {
    fn between(before: &[VcpuWrites], after: &[VcpuWrites], time: Duration) -> Self {
        let pairs = || before.iter().zip(after);
        let pages = pairs().map(|(before, after)| after.pages.saturating_sub(before.pages)).collect();
        let stood = |(before, after): (&VcpuWrites, &VcpuWrites)| {
            Some(after.stood_still?.saturating_sub(before.stood_still?).min(time))
        };
        Self { time, pages, stood: pairs().map(stood).collect() }
    }

    /// How much of its time the guest lost, on average over its vCPUs, if that is measured.
    pub(super) fn lost(&self) -> Option<Duration> {
        let stood = self.stood.as_ref()?;
        let vcpus = u32::try_from(stood.len().max(1)).unwrap_or(u32::MAX);
        Some(stood.iter().sum::<Duration>() / vcpus)
    }
}

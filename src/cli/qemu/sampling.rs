//! How fast a guest of QEMU writes its memory, before anything is sent.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use sterna::convergence::DirtySample;
use sterna::guest::GuestError;
use sterna::sampling::Sampled;
use sterna_qemu::monitor::{Accelerator, DirtyRateMode, Monitor, shortest_interval};
use sterna_qemu::shared_ram::{SharedRam, shared_ram};

use crate::cli::protocol::Samples;

/// Lets QEMU measure for `longest`, and for shorter intervals before.
pub(super) fn sample(
    monitor: &Monitor,
    accelerator: Accelerator,
    longest: Duration,
) -> Result<Samples, GuestError> {
    let ram = shared_ram(monitor).map_err(GuestError::new)?;
    let mode = match accelerator {
        Accelerator::Kvm if monitor.has_rings().map_err(GuestError::new)? => DirtyRateMode::DirtyRing,
        Accelerator::Kvm => DirtyRateMode::DirtyBitmap,
        Accelerator::Tcg if ram.iter().all(|ram| ram.block.len_bytes < SAMPLED_FROM) => {
            return Err(GuestError::new(UNMEASURED));
        }
        Accelerator::Tcg => DirtyRateMode::PageSampling,
    };
    let version = monitor.version().map_err(GuestError::new)?;
    let mut intervals =
        [16, 8, 4, 2, 1].map(|part| (longest / part).max(shortest_interval(version))).to_vec();
    intervals.dedup();
    let measured = intervals.into_iter().map(|interval| {
        let rate = monitor.dirty_rate(version, interval, mode).map_err(GuestError::new)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few GiB")]
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let dirty_bytes =
            (rate.mib_per_second as f64 * rate.interval.as_secs_f64() * f64::from(1 << 20)) as u64;
        Ok(DirtySample { interval: rate.interval, dirty_bytes })
    });
    let samples = measured.collect::<Result<_, GuestError>>()?;
    let sampled = Sampled {
        ram_bytes: ram.iter().map(|ram| ram.block.len_bytes).sum(),
        touched_bytes: touched_bytes(&ram)?,
        samples,
        // Which part of the switch QEMU spends on its log is unknown.
        harvest: Duration::ZERO,
        heartbeats_per_second: None,
        heartbeats_per_second_watched: None,
    };
    let note = match mode {
        DirtyRateMode::PageSampling => {
            "estimated by QEMU from some of its pages: without KVM, QEMU counts none"
        }
        _ => "counted by QEMU",
    };
    Ok(Samples { note: Some(note.into()), ..sampled.into() })
}

/// How much of the files behind RAM is allocated.
fn touched_bytes(ram: &[SharedRam]) -> Result<u64, GuestError> {
    let mut bytes = 0;
    for ram in ram {
        let allocated = ram.file.metadata().map_err(GuestError::new)?.blocks() * 512;
        bytes += allocated.min(ram.block.len_bytes);
    }
    Ok(bytes)
}

/// QEMU compares pages of blocks of this size and more only.
const SAMPLED_FROM: u64 = 128 << 20;

const UNMEASURED: &str = "QEMU counts the writes of a guest only under KVM, and estimates them without KVM only \
    for memory of 128 MiB and more";

//! `sterna-bench dirty-log`: KVM's dirty bitmap beside its dirty rings, for guests that write little and
//! much.
//!
//! Both logs of a guest are measured in turn. The cost of a round is the harvest and, with the bitmap, the
//! clearing of the harvested pages: the engine's work besides sending. The guest's cost shows in the speed at
//! which it sweeps its working set.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use sterna::dirty::{
    DirtyBitmap, DirtyError, DirtyLog, EitherLog, KvmLog, KvmSlot, SoftwareBitmap, SoftwareLog, Stripe,
    Stripes,
};
use sterna::memory::GuestRam;
use sterna_vmm::{
    DirtyRings, DirtyTracking, MachineConfig, RING_ENTRIES_MAX, SharedMachine, Workload, new_kvm,
    new_kvm_with_rings,
};

use crate::peers::statistics::Spread;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The first rounds find all pages dirty and the caches cold.
const ROUNDS_BEFORE: usize = 3;

#[derive(Debug, Args)]
pub(crate) struct DirtyLogArgs {
    /// RAM of the guests, in GiB; pages that they do not write take no memory
    #[arg(long, default_values_t = [1, 64, 256], value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=500), value_name = "GIB,…")]
    memory: Vec<u64>,
    /// How many rounds of 50 ms
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    rounds: u16,
}

type Failure = Box<dyn std::error::Error>;

pub(crate) fn run(args: &DirtyLogArgs) -> ExitCode {
    match measure(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &DirtyLogArgs) -> Result<(), Failure> {
    println!(
        "| RAM, GiB | asked, MB/s | pages a round, bitmap; rings | bitmap, ms a round | rings, ms a round | bitmap ÷ rings | guest's speed, bitmap; rings |"
    );
    println!("|---|---|---|---|---|---|---|");
    for &gib in &args.memory {
        for (rate_mb_per_s, working_set_bytes) in
            [(0, MIB), (10, 16 * MIB), (100, 64 * MIB), (1000, 256 * MIB)]
        {
            let workload = Workload { working_set_bytes, rate_mb_per_s, prefill: true, sweepers: 0 };
            let config = MachineConfig { memory_bytes: gib * GIB, vcpus: 1, hugepages: None, workload };
            let bitmap = watch(&new_kvm(config.clone())?, args.rounds)?;
            let rings = watch(&new_kvm_with_rings(config, RING_ENTRIES_MAX)?, args.rounds)?;
            let speed =
                |watched: &Watched| watched.speed.map_or("–".to_owned(), |speed| format!("{speed:.2}"));
            println!(
                "| {gib} | {rate_mb_per_s} | {:.0}; {:.0} | {} | {} | {:.2} | {}; {} |",
                bitmap.pages,
                rings.pages,
                cell(bitmap.ms),
                cell(rings.ms),
                bitmap.ms.median / rings.ms.median,
                speed(&bitmap),
                speed(&rings),
            );
        }
    }
    Ok(())
}

fn cell(spread: Spread) -> String {
    format!("{:.3} ({:.3}–{:.3})", spread.median, spread.min, spread.max)
}

/// The figures of a guest under a log.
struct Watched {
    /// Dirty pages, on average.
    pages: f64,
    /// The cost of a round.
    ms: Spread,
    /// The guest's write speed, as a share of its speed before; `None` if it writes nothing.
    speed: Option<f64>,
}

fn watch(machine: &SharedMachine, rounds: u16) -> Result<Watched, Failure> {
    const BETWEEN: Duration = Duration::from_millis(50);
    machine.start()?;
    thread::sleep(Duration::from_millis(300));
    let before = speed(machine, || {
        thread::sleep(Duration::from_millis(500));
        Ok(())
    })?;
    let log = Log::of(machine)?;
    let mut dirty = DirtyBitmap::new(&GuestRam::from_vm_memory(machine.memory())?.layout());
    let (mut times, mut pages) = (Vec::new(), 0);
    log.start()?;
    for _ in 0..ROUNDS_BEFORE {
        log.round(&mut dirty)?;
        thread::sleep(BETWEEN);
    }
    let meanwhile = speed(machine, || {
        for _ in 0..rounds {
            thread::sleep(BETWEEN);
            let began = Instant::now();
            pages += log.round(&mut dirty)?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    })?;
    log.stop()?;
    machine.stop();
    let ms = Spread::of(&times).ok_or("no rounds")?;
    let speed = (before > 0.0).then(|| meanwhile / before);
    Ok(Watched { pages: pages as f64 / f64::from(rounds), ms, speed })
}

/// The guest's write speed in pages a second while `during` runs.
fn speed(machine: &SharedMachine, during: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
    let written = || machine.status().vcpus.iter().map(|vcpu| vcpu.pages_written).sum::<u64>();
    let (before, began) = (written(), Instant::now());
    during()?;
    Ok(written().saturating_sub(before) as f64 / began.elapsed().as_secs_f64())
}

enum Log {
    Bitmap(EitherLog<KvmLog, SoftwareLog<SoftwareBitmap>>),
    Rings(Arc<DirtyRings>, SoftwareLog<SoftwareBitmap>),
}

impl Log {
    fn of(machine: &SharedMachine) -> Result<Self, Failure> {
        let software = SoftwareLog::new(machine.memory());
        match machine.dirty_tracking() {
            DirtyTracking::Kvm { vm, slots } => {
                let slot = |slot: sterna_vmm::MemorySlot| KvmSlot {
                    slot: slot.slot,
                    guest_address: slot.guest_address,
                    len_bytes: slot.len_bytes,
                    host_address: slot.host_address,
                };
                let ram = GuestRam::from_vm_memory(machine.memory())?;
                let slots = slots.into_iter().map(slot).collect();
                Ok(Self::Bitmap(EitherLog(kvm_log(vm.try_clone_to_owned()?, slots, &ram)?, software)))
            }
            DirtyTracking::Rings(rings) => Ok(Self::Rings(rings, software)),
            DirtyTracking::SoftwareOnly => Err("a machine on KVM is wanted".into()),
        }
    }

    fn start(&self) -> Result<(), Failure> {
        match self {
            Self::Bitmap(log) => {
                log.start()?;
                Ok(())
            }
            Self::Rings(rings, software) => {
                software.start()?;
                Ok(rings.watch()?)
            }
        }
    }

    fn stop(&self) -> Result<(), Failure> {
        match self {
            Self::Bitmap(log) => Ok(log.stop()?),
            Self::Rings(rings, _) => Ok(rings.forget()?),
        }
    }

    /// A round's work with the log: harvests, and clears the pages that the round will send. Returns the
    /// number of pages.
    fn round(&self, dirty: &mut DirtyBitmap) -> Result<u64, Failure> {
        dirty.clear();
        match self {
            Self::Bitmap(log) => {
                dirty.harvest(log)?;
                for part in Stripes::new(1).of_lane(0, dirty).flat_map(Stripe::parts) {
                    log.clear(part.region, part.first_page, part.words)?;
                }
            }
            Self::Rings(rings, software) => {
                rings.collect()?;
                dirty.harvest(software)?;
            }
        }
        Ok(dirty.count())
    }
}

#[expect(unsafe_code, reason = "a VMM answers for its memory slots")]
fn kvm_log(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<KvmLog, DirtyError> {
    // SAFETY: the machine set these slots, without flags, before it ran; it sets and deletes no other slot as
    // long as it exists.
    unsafe { KvmLog::new(vm, slots, ram) }
}

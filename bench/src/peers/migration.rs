//! A migration's parameters and results, for every program.

use super::cpu::CpuTime;
use super::failure::Failure;
use super::qemu::Way;
use super::record::Record;

/// The bytes that a busy guest writes over and over.
pub(crate) const LOOP_BYTES: u64 = 100 << 20;

/// The guest's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// None; all of its RAM is touched.
    Idle,
    /// All of its RAM is touched, and it adds one to a byte of each page of [`LOOP_BYTES`], as fast as it
    /// can.
    Loop,
}

impl Load {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Loop => "loop",
        }
    }
}

/// The program that moves a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    SternaRdma,
    SternaRdmaUnthrottled,
    SternaTcp,
    Qemu(Way),
    /// The guest of QEMU, moved by Sterna.
    SternaQemuRdma,
    SternaQemuTcp,
}

/// A migration that ended, with equal memory at both ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Migration {
    /// By the program's own report, set-up included.
    pub(crate) total_ms: f64,
    /// Measured from outside.
    pub(crate) wall_ms: f64,
    pub(crate) setup_ms: Option<f64>,
    pub(crate) downtime_ms: f64,
    pub(crate) moved_mb: f64,
    /// Of all processes on this machine.
    pub(crate) machine_cpu: CpuTime,
    /// Of the processes of both ends.
    pub(crate) own_cpu: CpuTime,
    /// Of those at the destination, if they were told apart.
    pub(crate) destination_cpu: Option<CpuTime>,
    /// A busy guest's write speed before the migration.
    pub(crate) guest_mbps: Option<f64>,
    /// The share by which the guest was throttled.
    pub(crate) throttle_percent: u8,
}

/// The name of a figure of a migration.
pub(crate) fn figure(load: Load, by: &str, what: &str) -> String {
    format!("{}, {by}: {what}", load.name())
}

impl Record {
    /// Records all figures of a migration, or the reason for which they are missing.
    pub(crate) fn migration(&mut self, load: Load, by: &str, outcome: Result<Migration, Failure>) {
        let name = |what| figure(load, by, what);
        match outcome {
            Err(failure) => {
                eprintln!("  {}, {by}: {failure}", load.name());
                self.note(&name("total"), "ms", Err(failure.to_string()));
                self.note(&name("downtime"), "ms", Err(failure.to_string()));
            }
            Ok(migration) => {
                let Migration { total_ms, downtime_ms, throttle_percent, .. } = migration;
                eprintln!("  {}, {by}: {total_ms:.0} ms, downtime {downtime_ms:.0} ms", load.name());
                self.note(&name("total"), "ms", Ok(total_ms));
                self.note(&name("wall"), "ms", Ok(migration.wall_ms));
                if let Some(setup_ms) = migration.setup_ms {
                    self.note(&name("set-up"), "ms", Ok(setup_ms));
                }
                self.note(&name("downtime"), "ms", Ok(downtime_ms));
                self.note(&name("moved"), "MB", Ok(migration.moved_mb));
                self.note(&name("CPU of the whole machine"), "s", Ok(migration.machine_cpu.total_s()));
                // The same processes run the busy guest.
                if load == Load::Idle {
                    self.note(&name("CPU of both ends, user"), "s", Ok(migration.own_cpu.user_s));
                    self.note(&name("CPU of both ends, system"), "s", Ok(migration.own_cpu.system_s));
                }
                if let Some(cpu) = migration.destination_cpu {
                    self.note(&name("CPU of the destination"), "s", Ok(cpu.total_s()));
                }
                if let Some(mbps) = migration.guest_mbps {
                    self.note(&name("guest wrote before"), "MB/s", Ok(mbps));
                }
                if throttle_percent > 0 {
                    self.note(&name("guest slowed by"), "%", Ok(throttle_percent.into()));
                }
            }
        }
    }
}

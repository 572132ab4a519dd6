//! A guest of stock QEMU.

use std::fmt::Display;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sterna::convergence::SwitchCost;
use sterna::dirty::DirtyLog;
use sterna::guest::{
    DestinationGuest, Guest, GuestError, Heartbeat, RunOutcome, SourceGuest, VcpuWrites, WriteQuota,
};
use sterna::memory::GuestRam;
use sterna::sampling::SamplingError;
use sterna::saved_state::{StateReader, StateWriter};
use sterna_qemu::compat::{End, Readiness, readiness};
use sterna_qemu::destination::DestinationQemu;
use sterna_qemu::error::QemuError;
use sterna_qemu::monitor::Monitor;
use sterna_qemu::settle::Settled;
use sterna_qemu::shared_ram::shared_ram;
use sterna_qemu::source::{Saved, SourceQemu};

use super::log::QemuLog;
use super::machine::QemuMachine;
use super::process::QemuProcess;
use super::{ram, sampling, start};
use crate::cli::ended::Ended;
use crate::cli::held::HeldGuest;
use crate::cli::protocol::{Checked, GuestKind, Samples, Vitals};
use crate::cli::server::Server;
use crate::cli::signals;
use crate::poison::IgnorePoison;

/// A guest of stock QEMU, as a guest of the engine.
#[derive(Debug)]
pub(crate) struct QemuGuest {
    name: String,
    /// Its control socket, which reserves the name.
    socket: Server,
    process: QemuProcess,
    ram: GuestRam,
    source: Arc<SourceQemu>,
    machine: Mutex<QemuMachine>,
    /// The QEMU that waits for the guest, until the guest has arrived.
    arrival: Option<Arrival>,
    /// What becomes of the source QEMU once the guest runs at another host.
    fate: Fate,
    cost: Mutex<SwitchCost>,
}

/// A guest on its way into this QEMU.
#[derive(Debug)]
struct Arrival {
    destination: DestinationQemu,
    plan: ArrivalPlan,
    /// QEMU was given a state, so it can take no other guest.
    loaded: AtomicBool,
    /// QEMU runs the guest, or keeps it paused as it was.
    started: AtomicBool,
}

/// How a guest arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct ArrivalPlan {
    /// The guest was paused at the source, and is to stay so.
    pub(super) was_paused: bool,
    /// The QEMU was started for this guest, and waits for no other.
    pub(super) started_for_it: bool,
}

/// What becomes of a QEMU whose guest has moved away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It ends.
    Quit,
    /// It stays, with the guest stopped.
    Keep,
}

impl QemuGuest {
    /// The guest that runs in the QEMU behind this monitor.
    pub(crate) fn adopted(
        name: String,
        socket: Server,
        monitor: Monitor,
        fate: Fate,
    ) -> Result<Self, GuestError> {
        let machine = QemuMachine::of(&monitor).map_err(GuestError::new)?;
        Self::new((name, socket), (monitor, machine), None, fate)
    }

    /// A guest that comes into the QEMU behind this monitor.
    pub(super) fn arriving(
        (name, socket): (String, Server),
        (monitor, machine, ready): (Monitor, QemuMachine, &Readiness),
        (plan, fate): (ArrivalPlan, Fate),
    ) -> Result<Self, GuestError> {
        let destination = DestinationQemu::new(monitor.clone(), ready, &name, !plan.was_paused);
        let destination = destination.map_err(GuestError::new)?;
        let (loaded, started) = (AtomicBool::new(false), AtomicBool::new(false));
        let arrival = Arrival { destination, plan, loaded, started };
        Self::new((name, socket), (monitor, machine), Some(arrival), fate)
    }

    fn new(
        (name, socket): (String, Server),
        (monitor, machine): (Monitor, QemuMachine),
        arrival: Option<Arrival>,
        fate: Fate,
    ) -> Result<Self, GuestError> {
        let shared = shared_ram(&monitor).map_err(GuestError::new)?;
        if arrival.is_some() {
            for block in &shared {
                block.make_fresh().map_err(GuestError::new)?;
            }
        }
        let (ram, blocks) = ram::map(shared)?;
        let process = QemuProcess::of(&monitor).map_err(GuestError::new)?;
        let source = SourceQemu::new(monitor, &name, blocks, STATE_MAX).map_err(GuestError::new)?;
        Ok(Self {
            name,
            socket,
            process,
            ram,
            source: Arc::new(source),
            machine: Mutex::new(machine),
            arrival,
            fate,
            cost: Mutex::new(COST),
        })
    }

    fn monitor(&self) -> &Monitor {
        self.source.monitor()
    }

    fn throttle_percent(&self) -> u8 {
        let report = self.monitor().migration().ok().filter(|report| report.status.is_under_way());
        let percent = report.and_then(|report| report.cpu_throttle_percentage).unwrap_or(0);
        u8::try_from(percent).unwrap_or(u8::MAX)
    }

    fn timed<T>(
        &self,
        part: fn(&mut SwitchCost) -> &mut Duration,
        work: impl FnOnce() -> Result<T, QemuError>,
    ) -> Result<T, GuestError> {
        let began = Instant::now();
        let done = work().map_err(GuestError::new)?;
        let cost = &mut *self.cost();
        *part(cost) = averaged(*part(cost), began.elapsed());
        Ok(done)
    }

    fn cost(&self) -> MutexGuard<'_, SwitchCost> {
        self.cost.lock().ignore_poison()
    }
}

impl Guest for QemuGuest {
    fn name(&self) -> &str {
        &self.name
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        Ok(self.ram.clone())
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for QemuGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        self.source.clear_up().map_err(GuestError::new)?;
        let ready = readiness(self.monitor(), End::Source).map_err(GuestError::new)?;
        if !ready.refused.is_empty() {
            let reasons: Vec<_> = ready.refused.iter().map(ToString::to_string).collect();
            return Err(GuestError::new(reasons.join("; ")));
        }
        let mut machine = self.machine.lock().ignore_poison();
        let mut description = machine.at_present(self.monitor()).map_err(GuestError::new)?.clone();
        description.was_paused = !ready.status.running;
        description.encode().map_err(GuestError::new)
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(Box::new(QemuLog(Arc::clone(&self.source))))
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.source.throttle(percent).map_err(GuestError::new)
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        self.source.limits_writes().then_some(self)
    }

    fn pause(&self) -> Result<(), GuestError> {
        let since = self.source.pause().map_err(GuestError::new)?;
        let cost = &mut *self.cost();
        cost.pause = averaged(cost.pause, since.elapsed());
        Ok(())
    }

    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        let Saved { blob, devices } = self.source.save().map_err(GuestError::new)?;
        blob.write_to(&mut state.section(SECTION)?)?;
        let cost = &mut *self.cost();
        // The engine sends the last pages as QEMU names them, and counts that time itself.
        cost.save = averaged(cost.save, devices);
        cost.state_bytes = blob.len_bytes();
        Ok(())
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        match self.source.take_back() {
            Ok(settled) => Ok(outcome(settled)),
            Err(error) if self.process.has_ended() || error.is_unknown() && self.process.is_ending() => {
                Ok(RunOutcome::Unknown { reason: format!("QEMU has ended, and the guest with it: {error}") })
            }
            Err(error) if error.is_unknown() => Ok(RunOutcome::Unknown { reason: error.to_string() }),
            Err(error) => Err(GuestError::new(error)),
        }
    }
}

impl WriteQuota for QemuGuest {
    fn writes(&self) -> Result<Vec<VcpuWrites>, GuestError> {
        let pages = self.source.writes().map_err(GuestError::new)?;
        // How long QEMU has a vCPU stand still is not among its answers.
        Ok(pages.into_iter().map(|pages| VcpuWrites { pages, stood_still: None }).collect())
    }

    fn limit(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), GuestError> {
        self.source.limit_writes(pages_per_second).map_err(GuestError::new)
    }
}

/// One switch on a busy host is no reason to expect as much of the next.
fn averaged(before: Duration, now: Duration) -> Duration {
    (before * 3 + now) / 4
}

/// A guest that is to stay paused counts as running: it does what it is to do.
fn outcome(settled: Settled) -> RunOutcome {
    match settled {
        Settled::Running | Settled::Paused => RunOutcome::Running,
        Settled::Unknown(reason) => RunOutcome::Unknown { reason },
        Settled::Ended => RunOutcome::Unknown { reason: "QEMU was ended".into() },
    }
}

impl DestinationGuest for QemuGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        self.arrival()?.destination.can_arrive().map_err(GuestError::new)
    }

    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        signals::guest_is_ready();
        let arrival = self.arrival()?;
        arrival.loaded.store(true, Ordering::Relaxed);
        let mut section = state.section(SECTION)?;
        self.timed(|cost| &mut cost.load, || arrival.destination.load(&mut section))?;
        self.cost().state_bytes = state.bytes_read();
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        let arrival = self.arrival()?;
        let settled = arrival.destination.start().map_err(GuestError::new)?;
        arrival.started.store(matches!(settled, Settled::Running | Settled::Paused), Ordering::Relaxed);
        Ok(outcome(settled))
    }

    /// A QEMU that was given no state can take another guest.
    fn discard(self) -> Result<(), GuestError> {
        match &self.arrival {
            Some(_) if self.process.has_ended() => Ok(()),
            Some(arrival) if arrival.loaded.load(Ordering::Relaxed) => match arrival.destination.quit() {
                // QEMU ends by itself if it cannot load a guest, and has no socket then.
                Err(error @ QemuError::Qmp(_)) => {
                    tracing::debug!("QEMU has ended: {error}");
                    Ok(())
                }
                other => other.map_err(GuestError::new),
            },
            Some(arrival) if arrival.plan.started_for_it => {
                start::end(self.monitor());
                Ok(())
            }
            Some(arrival) => {
                arrival.destination.release();
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl QemuGuest {
    fn arrival(&self) -> Result<&Arrival, GuestError> {
        self.arrival.as_ref().ok_or_else(|| GuestError::new("this QEMU does not wait for a guest"))
    }
}

impl HeldGuest for QemuGuest {
    fn socket(&self) -> &Server {
        &self.socket
    }

    fn vitals(&self) -> Vitals {
        let monitor = self.monitor();
        let failed = |error: &dyn Display| format!("unknown: {error}");
        let phase = monitor.status().map_or_else(|error| failed(&error), |status| status.state.to_string());
        Vitals {
            kind: GuestKind::Qemu,
            phase,
            memory_bytes: self.ram.layout().total_bytes(),
            vcpus: monitor.vcpus().map_or(0, |vcpus| u32::try_from(vcpus.len()).unwrap_or(u32::MAX)),
            heartbeats: 0,
            heartbeat_regressions: 0,
            passes: 0,
            throttle_percent: self.throttle_percent(),
            write_limit_pages_per_second: None,
        }
    }

    fn is_running(&self) -> bool {
        self.monitor().status().is_ok_and(|status| status.running)
    }

    fn monitor_socket(&self) -> Option<&Path> {
        Some(self.monitor().client().path())
    }

    fn has_ended(&self) -> bool {
        self.process.has_ended()
    }

    fn switch_cost(&self) -> SwitchCost {
        *self.cost()
    }

    fn sample(&self, longest: Duration) -> Result<Samples, SamplingError> {
        let accelerator = self.machine.lock().ignore_poison().accelerator();
        Ok(sampling::sample(self.monitor(), accelerator, longest)?)
    }

    fn check(&self) -> Result<Checked, String> {
        Err("a guest of QEMU cannot be asked to check its memory".into())
    }

    /// Not a part of the downtime: the guest runs already.
    fn arrived(&self) {
        if let Some(arrival) = self.arrival.as_ref().filter(|arrival| arrival.started.load(Ordering::Relaxed))
        {
            arrival.destination.release();
        }
    }

    fn moved(&self) {
        let (done, what) = match self.fate {
            Fate::Quit => (self.source.quit(), "does not end"),
            Fate::Keep => (self.source.leave(), "is not left as it should be"),
        };
        if let Err(error) = done
            && !self.process.has_ended()
        {
            tracing::error!("{} runs at another host, and its QEMU here {what}: {error}", self.name);
        }
    }

    /// The guest stays as it is, in a QEMU that Sterna has nothing to do with any more.
    fn released(&self) -> Ended {
        Ended::Released
    }

    fn without_process(&self) -> &'static str {
        "goes on in its QEMU"
    }
}

/// The section of the saved state.
const SECTION: &str = "qemu";

/// The longest state of devices that is read from QEMU.
const STATE_MAX: u64 = 1 << 30;

/// The cost of a switch before one was measured: QEMU pauses, saves and loads a few hundred KiB.
const COST: SwitchCost = SwitchCost {
    pause: Duration::from_millis(5),
    save: Duration::from_millis(20),
    load: Duration::from_millis(20),
    start: Duration::from_millis(5),
    state_bytes: 1 << 20,
};

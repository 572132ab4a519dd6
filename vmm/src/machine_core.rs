//! A machine of either kind: its life from fresh to stopped. [`Engine`] holds what differs between the kinds.

use std::fmt::Debug;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{MachineConfig, MachineKind};
use crate::cpu::CpuDescription;
use crate::error::MachineError;
use crate::machine::{DirtyTracking, Machine};
use crate::memory::clear_bitmaps;
use crate::platform::Platform;
use crate::poison::IgnorePoison;
use crate::ram::GuestRam;
use crate::snapshot::{self, Snapshot};
use crate::status::{GuestCheck, Heartbeat, MachineStatus, Phase, VcpuStatus};
use crate::vcpu_threads::{VcpuThreads, vcpu_thread};
use crate::write_quota::{self, VcpuWrites};

/// The part in which a real and a synthetic machine differ.
pub(crate) trait Engine: Debug + Send + Sync {
    /// The state of vCPUs and devices.
    type State: Serialize + DeserializeOwned;

    const KIND: MachineKind;

    fn cpu(&self) -> &CpuDescription;
    fn dirty_tracking(&self) -> DirtyTracking<'_>;
    fn console(&self) -> Vec<u8>;
    /// Writes what this kind needs in RAM and initialises the vCPUs.
    fn prepare(&self, platform: &Platform) -> Result<(), MachineError>;
    /// The work of a vCPU's thread until an order ends it; an error is the guest's failure.
    fn work(
        &self,
        vcpu: u8,
        platform: Arc<Platform>,
        vcpu_threads: Arc<VcpuThreads>,
    ) -> Box<dyn FnOnce() -> Result<(), String> + Send>;
    /// Reads the state of paused vCPUs.
    fn save(&self) -> Result<Self::State, MachineError>;
    /// Refuses another machine's state before anything is changed.
    fn check(&self, state: &Self::State, platform: &Platform) -> Result<(), MachineError>;
    fn load(&self, state: &Self::State, platform: &Platform) -> Result<(), MachineError>;
}

/// A machine with an engine.
#[derive(Debug)]
pub(crate) struct MachineCore<E: Engine> {
    platform: Arc<Platform>,
    vcpu_threads: Arc<VcpuThreads>,
    engine: E,
    life: Mutex<Life>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Fresh,
    /// Paused; its threads have not started yet.
    Loaded,
    Running,
    Paused,
    Stopped,
}

impl<E: Engine> MachineCore<E> {
    pub(crate) fn new(platform: Platform, vcpu_threads: Arc<VcpuThreads>, engine: E) -> Self {
        Self { platform: Arc::new(platform), vcpu_threads, engine, life: Mutex::new(Life::Fresh) }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().ignore_poison()
    }

    /// Starts the threads; they run at once.
    fn go(&self, life: &mut Life) -> Result<(), MachineError> {
        // All or none: if one cannot be started, none has run.
        self.vcpu_threads.hold();
        self.look_at_rings()?;
        for vcpu in self.platform.vcpus() {
            let work = self.engine.work(vcpu, Arc::clone(&self.platform), Arc::clone(&self.vcpu_threads));
            if let Err(error) = self.vcpu_threads.spawn(vcpu_thread(vcpu.into()), work) {
                self.vcpu_threads.stop();
                *life = Life::Stopped;
                return Err(error);
            }
        }
        self.vcpu_threads.resume();
        *life = Life::Running;
        Ok(())
    }
}

impl<E: Engine> MachineCore<E> {
    /// Starts the thread that collects the dirty rings when they fill, and keeps the quota.
    fn look_at_rings(&self) -> Result<(), MachineError> {
        let DirtyTracking::Rings(rings) = self.engine.dirty_tracking() else { return Ok(()) };
        let threads = Arc::clone(&self.vcpu_threads);
        self.vcpu_threads.repeat("dirty rings", move || {
            let is_watched = rings.collect_filling().unwrap_or_else(|error| {
                // What was taken counts as lost, and the next collection says so.
                tracing::warn!("the dirty rings cannot be collected: {error}");
                true
            });
            rings.quota().over().for_each(|vcpu| threads.kick_vcpu(vcpu));
            if is_watched { write_quota::PERIOD } else { write_quota::IDLE_PERIOD }
        })
    }
}

impl<E: Engine> Machine for MachineCore<E> {
    fn kind(&self) -> MachineKind {
        E::KIND
    }

    fn config(&self) -> &MachineConfig {
        &self.platform.config
    }

    fn cpu(&self) -> &CpuDescription {
        self.engine.cpu()
    }

    fn memory(&self) -> &GuestRam {
        &self.platform.memory
    }

    fn dirty_tracking(&self) -> DirtyTracking<'_> {
        self.engine.dirty_tracking()
    }

    fn start(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        if *life != Life::Fresh {
            return wrong_phase("start", *life, "fresh");
        }
        self.engine.prepare(&self.platform)?;
        // The writes so far are the guest's initial memory, not changes.
        clear_bitmaps(&self.platform.memory);
        self.go(&mut life)
    }

    fn pause(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        match *life {
            Life::Loaded => Ok(()),
            Life::Running | Life::Paused => {
                self.vcpu_threads.pause()?;
                *life = Life::Paused;
                Ok(())
            }
            Life::Fresh | Life::Stopped => wrong_phase("pause", *life, "running"),
        }
    }

    fn resume(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        match *life {
            Life::Loaded => self.go(&mut life),
            Life::Running | Life::Paused => {
                self.vcpu_threads.alive()?;
                self.vcpu_threads.resume();
                *life = Life::Running;
                Ok(())
            }
            Life::Fresh | Life::Stopped => wrong_phase("resume", *life, "paused"),
        }
    }

    fn throttle(&self, percent: u8) -> Result<(), MachineError> {
        if percent > 99 {
            return Err(MachineError::Config(format!("a throttle of {percent}% is not between 0 and 99")));
        }
        let life = self.life();
        if *life == Life::Stopped {
            return wrong_phase("throttle", *life, "running");
        }
        self.vcpu_threads.throttle(percent)
    }

    fn limit_writes(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), MachineError> {
        let DirtyTracking::Rings(rings) = self.dirty_tracking() else {
            return Err(MachineError::NoWriteQuota);
        };
        let life = self.life();
        if *life == Life::Stopped {
            return wrong_phase("limit the writes", *life, "running");
        }
        rings.quota().set(pages_per_second);
        self.vcpu_threads.wake();
        Ok(())
    }

    fn vcpu_writes(&self) -> Option<Vec<VcpuWrites>> {
        match self.dirty_tracking() {
            DirtyTracking::Rings(rings) => Some(rings.quota().writes()),
            DirtyTracking::Kvm { .. } | DirtyTracking::SoftwareOnly => None,
        }
    }

    fn save(&self) -> Result<Vec<u8>, MachineError> {
        let life = self.life();
        if !matches!(*life, Life::Paused | Life::Loaded) {
            return wrong_phase("save", *life, "paused");
        }
        self.vcpu_threads.alive()?;
        let MachineConfig { memory_bytes, vcpus, ref workload, .. } = self.platform.config;
        let workload = workload.clone();
        let (beats, engine) = (self.platform.heartbeat_device.counts(), self.engine.save()?);
        snapshot::encode(E::KIND, &Snapshot { memory_bytes, vcpus, workload, beats, engine })
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        let mut life = self.life();
        if *life != Life::Fresh {
            return wrong_phase("load", *life, "fresh");
        }
        let snapshot: Snapshot<E::State> = snapshot::decode(E::KIND, state)?;
        snapshot.check_fits(&self.platform.config)?;
        self.engine.check(&snapshot.engine, &self.platform)?;
        self.engine.load(&snapshot.engine, &self.platform)?;
        self.platform.heartbeat_device.adopt(&snapshot.beats);
        *life = Life::Loaded;
        Ok(())
    }

    fn heartbeat(&self) -> Heartbeat {
        self.platform.heartbeat_device.heartbeat(0)
    }

    fn status(&self) -> MachineStatus {
        let vcpus: Vec<_> = self.platform.vcpus().map(|vcpu| self.platform.vcpu_status(vcpu)).collect();
        let whole = |vcpu: &VcpuStatus| vcpu.pages_written.checked_div(vcpu.pages);
        let passes = vcpus.iter().filter_map(whole).min().unwrap_or(0);
        let phase = match (*self.life(), self.vcpu_threads.alive()) {
            (Life::Stopped, _) => Phase::Stopped,
            (_, Err(MachineError::GuestFailed { reason })) => Phase::Failed(reason),
            (Life::Fresh, _) => Phase::Fresh,
            (Life::Running, _) => Phase::Running,
            (Life::Loaded | Life::Paused, _) => Phase::Paused,
        };
        let pages_per_second = match self.dirty_tracking() {
            DirtyTracking::Rings(rings) => rings.quota().pages_per_second(),
            DirtyTracking::Kvm { .. } | DirtyTracking::SoftwareOnly => None,
        };
        let throttle_percent = self.vcpu_threads.throttle_percent();
        MachineStatus { phase, passes, throttle_percent, pages_per_second, vcpus }
    }

    fn console(&self) -> Vec<u8> {
        self.engine.console()
    }

    fn check_from_inside(&self, timeout: Duration) -> Result<GuestCheck, MachineError> {
        let life = *self.life();
        if life != Life::Running {
            return wrong_phase("check the guest from inside", life, "running");
        }
        self.platform.check_from_inside(timeout, || self.vcpu_threads.alive())
    }

    fn check_from_outside(&self) -> Result<GuestCheck, MachineError> {
        // Held to the end, so that no other thread resumes the machine meanwhile.
        let life = self.life();
        if !matches!(*life, Life::Paused | Life::Loaded) {
            return wrong_phase("check the guest from outside", *life, "paused");
        }
        self.platform.check_from_outside()
    }

    fn stop(&self) {
        let mut life = self.life();
        self.vcpu_threads.stop();
        *life = Life::Stopped;
    }
}

impl<E: Engine> Drop for MachineCore<E> {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wrong_phase<T>(doing: &'static str, life: Life, wanted: &'static str) -> Result<T, MachineError> {
    let phase = match life {
        Life::Fresh => "fresh",
        Life::Loaded | Life::Paused => "paused",
        Life::Running => "running",
        Life::Stopped => "stopped",
    };
    Err(MachineError::WrongPhase { doing, phase, wanted })
}

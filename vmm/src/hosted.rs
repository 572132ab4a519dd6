//! A machine of either kind: its life from fresh to stopped. What differs between the kinds is behind [`Engine`].

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::board::Board;
use crate::cpu::CpuDescription;
use crate::crew::Crew;
use crate::error::MachineError;
use crate::machine::{
    DirtyTracking, GuestCheck, GuestRam, Heartbeat, Machine, MachineConfig, MachineKind, MachineStatus,
    Phase, VcpuStatus,
};
use crate::memory::clear_bitmaps;
use crate::snapshot::{self, Snapshot};

/// What makes a machine a real one or a synthetic one.
pub(crate) trait Engine: Debug + Send + Sync {
    /// The state of vCPUs and devices.
    type State: Serialize + DeserializeOwned;

    const KIND: MachineKind;

    fn cpu(&self) -> &CpuDescription;
    fn dirty_tracking(&self) -> DirtyTracking<'_>;
    fn console(&self) -> Vec<u8>;
    /// Writes what this kind needs in RAM and sets the vCPUs to their beginning.
    fn prepare(&self, board: &Board) -> Result<(), MachineError>;
    /// What the thread of a vCPU does until it is told to leave; an error is the guest's failure.
    fn work(
        &self,
        vcpu: u8,
        board: Arc<Board>,
        crew: Arc<Crew>,
    ) -> Box<dyn FnOnce() -> Result<(), String> + Send>;
    /// Reads the state of vCPUs that stand still.
    fn save(&self) -> Result<Self::State, MachineError>;
    /// Refuses a state that cannot be this machine's, before anything is changed.
    fn check(&self, state: &Self::State, board: &Board) -> Result<(), MachineError>;
    fn load(&self, state: &Self::State, board: &Board) -> Result<(), MachineError>;
}

/// A machine with an engine.
#[derive(Debug)]
pub(crate) struct Hosted<E: Engine> {
    board: Arc<Board>,
    crew: Arc<Crew>,
    engine: E,
    life: Mutex<Life>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Fresh,
    /// Paused, and its threads are yet to be started.
    Loaded,
    Running,
    Paused,
    Stopped,
}

impl<E: Engine> Hosted<E> {
    pub(crate) fn new(board: Board, crew: Arc<Crew>, engine: E) -> Self {
        Self { board: Arc::new(board), crew, engine, life: Mutex::new(Life::Fresh) }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the threads; they run at once.
    fn go(&self, life: &mut Life) -> Result<(), MachineError> {
        // All or none: if one cannot be started, none has run.
        self.crew.hold();
        for vcpu in self.board.vcpus() {
            let work = self.engine.work(vcpu, Arc::clone(&self.board), Arc::clone(&self.crew));
            if let Err(error) = self.crew.spawn(format!("vcpu {vcpu}"), work) {
                self.crew.stop();
                *life = Life::Stopped;
                return Err(error);
            }
        }
        self.crew.resume();
        *life = Life::Running;
        Ok(())
    }
}

impl<E: Engine> Machine for Hosted<E> {
    fn kind(&self) -> MachineKind {
        E::KIND
    }

    fn config(&self) -> &MachineConfig {
        &self.board.config
    }

    fn cpu(&self) -> &CpuDescription {
        self.engine.cpu()
    }

    fn memory(&self) -> &GuestRam {
        &self.board.memory
    }

    fn dirty_tracking(&self) -> DirtyTracking<'_> {
        self.engine.dirty_tracking()
    }

    fn start(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        if *life != Life::Fresh {
            return wrong_phase("start", *life, "fresh");
        }
        self.engine.prepare(&self.board)?;
        // What was written so far is the guest's beginning and no change.
        clear_bitmaps(&self.board.memory);
        self.go(&mut life)
    }

    fn pause(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        match *life {
            Life::Loaded => Ok(()),
            Life::Running | Life::Paused => {
                self.crew.pause()?;
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
                self.crew.alive()?;
                self.crew.resume();
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
        self.crew.throttle(percent)
    }

    fn save(&self) -> Result<Vec<u8>, MachineError> {
        let life = self.life();
        if !matches!(*life, Life::Paused | Life::Loaded) {
            return wrong_phase("save", *life, "paused");
        }
        self.crew.alive()?;
        let MachineConfig { memory_bytes, vcpus, ref workload, .. } = self.board.config;
        let workload = workload.clone();
        let (beats, engine) = (self.board.heart.counts(), self.engine.save()?);
        snapshot::encode(E::KIND, &Snapshot { memory_bytes, vcpus, workload, beats, engine })
    }

    fn load(&self, state: &[u8]) -> Result<(), MachineError> {
        let mut life = self.life();
        if *life != Life::Fresh {
            return wrong_phase("load", *life, "fresh");
        }
        let snapshot: Snapshot<E::State> = snapshot::decode(E::KIND, state)?;
        snapshot.check_fits(&self.board.config)?;
        self.engine.check(&snapshot.engine, &self.board)?;
        self.engine.load(&snapshot.engine, &self.board)?;
        self.board.heart.adopt(&snapshot.beats);
        *life = Life::Loaded;
        Ok(())
    }

    fn heartbeat(&self) -> Heartbeat {
        self.board.heart.heartbeat(0)
    }

    fn status(&self) -> MachineStatus {
        let vcpus: Vec<_> = self.board.vcpus().map(|vcpu| self.board.vcpu_status(vcpu)).collect();
        let whole = |vcpu: &VcpuStatus| vcpu.pages_written.checked_div(vcpu.pages);
        let passes = vcpus.iter().filter_map(whole).min().unwrap_or(0);
        let phase = match (*self.life(), self.crew.alive()) {
            (Life::Stopped, _) => Phase::Stopped,
            (_, Err(MachineError::GuestFailed { reason })) => Phase::Failed(reason),
            (Life::Fresh, _) => Phase::Fresh,
            (Life::Running, _) => Phase::Running,
            (Life::Loaded | Life::Paused, _) => Phase::Paused,
        };
        MachineStatus { phase, passes, throttle_percent: self.crew.throttle_percent(), vcpus }
    }

    fn console(&self) -> Vec<u8> {
        self.engine.console()
    }

    fn check_from_inside(&self, timeout: Duration) -> Result<GuestCheck, MachineError> {
        let life = *self.life();
        if life != Life::Running {
            return wrong_phase("check the guest from inside", life, "running");
        }
        self.board.check_from_inside(timeout, || self.crew.alive())
    }

    fn check_from_outside(&self) -> Result<GuestCheck, MachineError> {
        // Held to the end, so that nobody resumes the machine meanwhile.
        let life = self.life();
        if !matches!(*life, Life::Paused | Life::Loaded) {
            return wrong_phase("check the guest from outside", *life, "paused");
        }
        self.board.check_from_outside()
    }

    fn stop(&self) {
        let mut life = self.life();
        self.crew.stop();
        *life = Life::Stopped;
    }
}

impl<E: Engine> Drop for Hosted<E> {
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

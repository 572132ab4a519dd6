//! The adapter from `sterna-vmm`'s machines to the engine's guest.

use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sterna::convergence::SwitchCost;
use sterna::destination::PendingArrival;
use sterna::dirty::{DirtyLog, EitherLog, KvmLog, KvmSlot, SoftwareLog};
use sterna::guest::Refusal;
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, VcpuWrites,
    WriteQuota,
};
use sterna::host;
use sterna::memory::GuestRam;
use sterna::sampling::{Sampled, SamplingError};
use sterna::saved_state::{StateReader, StateWriter};
use sterna_qemu::compat::Description;
use sterna_vmm::{
    CpuDescription, DirtyTracking, MAX_STATE_BYTES, MachineConfig, MachineError, MachineKind, Phase,
    SharedMachine, host_cpu,
};

use super::device_state;
use super::dirty_log::{DirtyLogArgs, RingLog};
use super::ended::Ended;
use super::held::HeldGuest;
use super::incoming::Incoming;
use super::protocol::{Checked, GuestKind, Samples, Vitals};
use super::server::Server;
use super::signals;
use super::socket::{Listener, SocketError};
use crate::poison::IgnorePoison;

/// A machine of `sterna-vmm` as a guest of the engine.
#[derive(Debug)]
pub(crate) struct MachineGuest {
    pub(crate) name: String,
    pub(crate) machine: SharedMachine,
    /// Its control socket, which reserves the name from the start.
    pub(crate) socket: Server,
    /// How much state a simulated device adds to the machine's.
    device_state_bytes: u64,
    cost: Mutex<SwitchCost>,
}

impl MachineGuest {
    pub(crate) fn new(name: String, machine: SharedMachine, socket: Server) -> Self {
        Self { name, machine, socket, device_state_bytes: 0, cost: Mutex::default() }
    }

    /// The same guest with a simulated device that has this much state.
    pub(crate) fn with_device_state(self, device_state_bytes: u64) -> Self {
        Self { device_state_bytes, ..self }
    }

    /// Pauses, saves and resumes a guest that has just been started, to measure how long that takes.
    pub(crate) fn rehearse(&self) -> Result<(), GuestError> {
        self.timed(|cost| &mut cost.pause, || self.machine.pause()).map_err(GuestError::new)?;
        let saved = self.save(&mut StateWriter::new(&mut io::sink()));
        self.machine.resume().map_err(GuestError::new)?;
        saved?;
        let mut cost = self.cost();
        // No load has been measured yet; it is as much work.
        cost.load = cost.save;
        Ok(())
    }

    fn timed<T, E>(
        &self,
        part: fn(&mut SwitchCost) -> &mut Duration,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let began = Instant::now();
        let result = work();
        if result.is_ok() {
            *part(&mut self.cost()) = began.elapsed();
        }
        result
    }

    fn cost(&self) -> MutexGuard<'_, SwitchCost> {
        self.cost.lock().ignore_poison()
    }
}

/// Passes writes on, and adds up the time that they take.
struct Measured<'save, W> {
    to: W,
    waited: &'save mut Duration,
}

impl<W: Write> Write for Measured<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let began = Instant::now();
        let count = self.to.write(bytes)?;
        *self.waited += began.elapsed();
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The sections of its saved state: the machine's, and that of a simulated device if it has one.
const MACHINE: &str = "machine";
const DEVICE: &str = "made-up-device";

/// What a destination needs to make the same machine.
#[derive(Serialize, Deserialize)]
struct Details {
    kind: MachineKind,
    config: MachineConfig,
    cpu: CpuDescription,
    device_state_bytes: u64,
}

impl Details {
    /// The description from the bytes of a peer.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (details, rest) = postcard::take_from_bytes(bytes).ok()?;
        rest.is_empty().then_some(details)
    }
}

/// Whether a peer's description is that of a machine of `sterna-vmm`.
pub(crate) fn is_description(bytes: &[u8]) -> bool {
    Details::decode(bytes).is_some()
}

impl Guest for MachineGuest {
    fn name(&self) -> &str {
        &self.name
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        GuestRam::from_vm_memory(self.machine.memory()).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        let beat = self.machine.heartbeat();
        let age = sterna_vmm::monotonic_ns().saturating_sub(beat.at_ns);
        Some(Heartbeat { count: beat.count, age: Duration::from_nanos(age) })
    }
}

impl SourceGuest for MachineGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        let (kind, config, cpu) =
            (self.machine.kind(), self.machine.config().clone(), self.machine.cpu().clone());
        let device_state_bytes = self.device_state_bytes;
        postcard::to_stdvec(&Details { kind, config, cpu, device_state_bytes }).map_err(GuestError::new)
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let software = SoftwareLog::new(self.machine.memory());
        match self.machine.dirty_tracking() {
            DirtyTracking::SoftwareOnly => Ok(Box::new(software)),
            DirtyTracking::Rings(rings) => Ok(Box::new(RingLog::new(rings, software))),
            DirtyTracking::Kvm { vm, slots } => {
                let slots = slots
                    .into_iter()
                    .map(|slot| KvmSlot {
                        slot: slot.slot,
                        guest_address: slot.guest_address,
                        len_bytes: slot.len_bytes,
                        host_address: slot.host_address,
                    })
                    .collect();
                let vm = vm.try_clone_to_owned().map_err(GuestError::new)?;
                Ok(Box::new(EitherLog(kvm_log(vm, slots, &self.ram()?)?, software)))
            }
        }
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.machine.throttle(percent).map_err(GuestError::new)
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        self.machine.vcpu_writes().is_some().then_some(self)
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.timed(|cost| &mut cost.pause, || self.machine.pause()).map_err(GuestError::new)
    }

    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        let began = Instant::now();
        let mut waited = Duration::ZERO;
        let machine = self.machine.save().map_err(GuestError::new)?;
        Measured { to: state.section(MACHINE)?, waited: &mut waited }.write_all(&machine)?;
        if self.device_state_bytes > 0 {
            let mut device = Measured { to: state.section(DEVICE)?, waited: &mut waited };
            device_state::write(self.device_state_bytes, &mut device)?;
        }
        let mut cost = self.cost();
        // The engine accounts for the link's time.
        (cost.state_bytes, cost.save) = (state.bytes_written(), began.elapsed().saturating_sub(waited));
        Ok(())
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        self.machine.resume().map_err(GuestError::new)?;
        Ok(RunOutcome::Running)
    }
}

impl WriteQuota for MachineGuest {
    fn writes(&self) -> Result<Vec<VcpuWrites>, GuestError> {
        let writes = self.machine.vcpu_writes().ok_or_else(|| GuestError::new("it has no dirty rings"))?;
        let of = |vcpu: sterna_vmm::VcpuWrites| VcpuWrites {
            pages: vcpu.pages,
            stood_still: Some(vcpu.stood_still),
        };
        Ok(writes.into_iter().map(of).collect())
    }

    fn limit(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), GuestError> {
        self.machine.limit_writes(pages_per_second).map_err(GuestError::new)
    }
}

impl DestinationGuest for MachineGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        signals::guest_is_ready();
        self.timed(
            |cost| &mut cost.load,
            || {
                let mut machine = Vec::new();
                state.section(MACHINE)?.take(MAX_STATE_BYTES as u64 + 1).read_to_end(&mut machine)?;
                if machine.len() > MAX_STATE_BYTES {
                    return Err(GuestError::new("the saved state is longer than that of any machine"));
                }
                if self.device_state_bytes > 0 {
                    device_state::check(self.device_state_bytes, &mut state.section(DEVICE)?)?;
                }
                self.machine.load(&machine).map_err(GuestError::new)
            },
        )?;
        let mut cost = self.cost();
        (cost.state_bytes, cost.save) = (state.bytes_read(), cost.load);
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.resume()
    }

    fn discard(self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl HeldGuest for MachineGuest {
    fn socket(&self) -> &Server {
        &self.socket
    }

    fn vitals(&self) -> Vitals {
        let machine = &self.machine;
        let (status, beat) = (machine.status(), machine.heartbeat());
        Vitals {
            kind: match machine.kind() {
                MachineKind::Kvm => GuestKind::Kvm,
                MachineKind::Synthetic => GuestKind::Synthetic,
            },
            phase: match status.phase {
                Phase::Fresh => "fresh".into(),
                Phase::Running => "running".into(),
                Phase::Paused => "paused".into(),
                Phase::Stopped => "stopped".into(),
                Phase::Failed(reason) => format!("failed: {reason}"),
            },
            memory_bytes: machine.config().memory_bytes,
            vcpus: machine.config().vcpus.into(),
            heartbeats: beat.count,
            heartbeat_regressions: beat.regressions,
            passes: status.passes,
            throttle_percent: status.throttle_percent,
            write_limit_pages_per_second: status.pages_per_second,
        }
    }

    fn is_running(&self) -> bool {
        self.machine.status().phase == Phase::Running
    }

    fn monitor_socket(&self) -> Option<&Path> {
        None
    }

    fn has_ended(&self) -> bool {
        false
    }

    fn switch_cost(&self) -> SwitchCost {
        *self.cost()
    }

    fn sample(&self, longest: Duration) -> Result<Samples, SamplingError> {
        Sampled::of(self, longest).map(Samples::from)
    }

    fn check(&self) -> Result<Checked, String> {
        let pages = self.machine.config().memory_bytes / sterna_vmm::PAGE_BYTES;
        let limit = Duration::from_secs(60) + Duration::from_millis(pages);
        let checked = self.machine.check_from_inside(limit).map_err(|error| error.to_string())?;
        Ok(Checked { pages: checked.pages, wrong: checked.wrong })
    }

    fn arrived(&self) {}

    fn moved(&self) {
        self.machine.stop();
    }

    fn released(&self) -> Ended {
        self.machine.stop();
        Ended::Stopped
    }

    fn without_process(&self) -> &'static str {
        "ends"
    }
}

const OF_ANOTHER_VERSION: &str = "its description is not of this version";

/// The guest has another VMM.
const OF_QEMU: &str = "it is a guest of QEMU, and this host waits for one of Sterna's own VMM; start \
    `sterna receive` at the destination with `--qmp SOCKET` or `--start COMMAND`";

#[expect(unsafe_code, reason = "a VMM answers for its memory slots")]
fn kvm_log(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<KvmLog, GuestError> {
    // SAFETY: the machine set these slots, without flags, before it ran; it sets and deletes no other slot as
    // long as it exists.
    unsafe { KvmLog::new(vm, slots, ram) }.map_err(GuestError::new)
}

/// Makes machines for guests that arrive.
#[derive(Debug)]
pub(crate) struct MachineHost {
    /// The guest's name on this host; `None` keeps its own.
    pub(crate) name: Option<String>,
    /// The most RAM that a guest may have.
    pub(crate) memory_max_bytes: Option<u64>,
    /// How KVM records the guest's writes.
    pub(crate) dirty_log: DirtyLogArgs,
    /// The operator's handle on an arriving guest.
    pub(crate) pending: PendingArrival,
}

impl GuestHost for MachineHost {
    type Guest = MachineGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<MachineGuest, Refusal> {
        let incompatible = |error: MachineError| Refusal::Incompatible(error.to_string());
        let details = Details::decode(proposal.details).ok_or_else(|| {
            let of_qemu = Description::decode(proposal.details).is_ok();
            Refusal::Incompatible(if of_qemu { OF_QEMU } else { OF_ANOTHER_VERSION }.into())
        })?;
        let name = self.name.clone().unwrap_or_else(|| proposal.name.to_owned());
        signals::guest_arrives();
        let socket = Listener::bind(&name).map_err(|error| match error {
            SocketError::Taken(name) => Refusal::NameTaken(name),
            error => Refusal::Incompatible(error.to_string()),
        })?;
        let needed_bytes = proposal.ram.total_bytes();
        if details.config.memory_bytes != needed_bytes {
            return Err(Refusal::Incompatible("its description speaks of other RAM than it offers".into()));
        }
        let available_bytes =
            [self.memory_max_bytes, host::available_memory_bytes()].into_iter().flatten().min();
        if let Some(available_bytes) = available_bytes.filter(|&available| available < needed_bytes) {
            return Err(Refusal::Memory { needed_bytes, available_bytes });
        }
        if details.kind == MachineKind::Kvm {
            let missing = details.cpu.missing_on(&host_cpu().map_err(incompatible)?);
            if !missing.is_empty() {
                return Err(Refusal::Incompatible(format!(
                    "its processor lacks here: {}",
                    missing.join(", ")
                )));
            }
        }
        let dirty_log = match details.kind {
            MachineKind::Kvm => self.dirty_log,
            MachineKind::Synthetic => DirtyLogArgs::default(),
        };
        let machine = dirty_log.new_machine(details.kind, details.config).map_err(incompatible)?;
        let socket = Server::new(socket);
        socket.serve(Arc::new(Incoming { pending: self.pending.clone() }));
        Ok(MachineGuest::new(name, machine, socket).with_device_state(details.device_state_bytes))
    }
}

//! A machine of `sterna-vmm` as a guest of the engine, for tests of the library itself: a test can make its
//! calls fail.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sterna::dirty::{
    CaughtUp, DirtyError, DirtyLog, DirtyRegion, EitherLog, InitiallyDirty, KvmLog, KvmSlot, SoftwareBitmap,
    SoftwareLog,
};
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, WriteQuota,
};
use sterna::memory::GuestRam;
use sterna::progress::{Event, Observer};
use sterna::saved_state::{StateReader, StateWriter};
use sterna::wire::Refusal;
use sterna_vmm::{
    CpuDescription, DirtyTracking, MachineConfig, MachineKind, Phase, SharedMachine, Workload, new_kvm,
    new_synthetic,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{machine_kind, wait_until};

const MEMORY_BYTES: u64 = 16 << 20;
const WORKING_SET_BYTES: u64 = 4 << 20;

/// A range in the middle of RAM: the built-in guest uses only both ends.
const UNUSED: Range<u64> = 4 << 20..12 << 20;
const PAGE_BYTES: usize = 4096;

/// The call of the engine that fails or misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Pause,
    Save,
    Load,
    Resume,
    /// A panic while a paused guest is saved.
    DefectInSave,
}

#[derive(Debug)]
pub(crate) struct TestGuest {
    name: String,
    pub(crate) machine: SharedMachine,
    pub(crate) faults: Mutex<Vec<Fault>>,
    /// Whether the log of the VMM's own writes is left out.
    pub(crate) forget_own_writes: AtomicBool,
    /// Whether saving writes into RAM, as some device models do.
    pub(crate) write_when_saved: AtomicBool,
    /// Whether the VMM writes 8 MiB of RAM, as a busy device would, before each harvest of its dirty log.
    pub(crate) busy: Arc<AtomicBool>,
    /// How often the engine resumed it; shared with the host that made it.
    resumed: Arc<AtomicUsize>,
}

#[derive(Serialize, Deserialize)]
struct Details {
    kind: MachineKind,
    config: MachineConfig,
    cpu: CpuDescription,
}

impl TestGuest {
    /// A small guest at work.
    pub(crate) fn started() -> Self {
        Self::started_at(20)
    }

    /// The same by another name than `tern`.
    pub(crate) fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The same, writing at this rate in MB/s.
    pub(crate) fn started_at(rate_mb_per_s: u64) -> Self {
        let workload =
            Workload { working_set_bytes: WORKING_SET_BYTES, rate_mb_per_s, prefill: true, sweepers: 0 };
        let config = MachineConfig { memory_bytes: MEMORY_BYTES, vcpus: 1, hugepages: None, workload };
        let guest = Self::of(make(machine_kind(), config));
        guest.machine.start().expect("the guest starts");
        guest.beats_on();
        guest
    }

    /// An idle guest with this much RAM, using little more than one page in every `stride_bytes`.
    pub(crate) fn started_sparse(memory_bytes: u64, stride_bytes: u64) -> Self {
        let workload = Workload { working_set_bytes: 64 << 10, rate_mb_per_s: 0, prefill: true, sweepers: 0 };
        let config = MachineConfig { memory_bytes, vcpus: 1, hugepages: None, workload };
        let guest = Self::of(make(machine_kind(), config));
        for address in guest.scattered(stride_bytes) {
            guest.machine.memory().write_obj(address, GuestAddress(address)).expect("the address is in RAM");
        }
        guest.machine.start().expect("the guest starts");
        guest.beats_on();
        guest
    }

    /// Addresses `stride_bytes` apart over all of RAM, away from the parts at both ends that the guest itself
    /// uses.
    pub(crate) fn scattered(&self, stride_bytes: u64) -> Vec<u64> {
        let of = |region: &GuestRegionMmap<_>| {
            let first = region.start_addr().0 + stride_bytes / 2;
            (0..region.len() / stride_bytes).map(move |index| first + index * stride_bytes)
        };
        self.machine.memory().iter().flat_map(of).collect()
    }

    /// The memory that its RAM takes: pages touched by the guest or the VMM.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let memory = self.machine.memory();
        let file = memory.iter().next().and_then(GuestMemoryRegion::file_offset).expect("its RAM is a memfd");
        file.file().metadata().expect("a file has metadata").blocks() * 512
    }

    fn of(machine: SharedMachine) -> Self {
        Self {
            name: "tern".into(),
            machine,
            faults: Mutex::default(),
            forget_own_writes: AtomicBool::default(),
            write_when_saved: AtomicBool::default(),
            busy: Arc::default(),
            resumed: Arc::default(),
        }
    }

    /// Makes this call fail from now on.
    pub(crate) fn fail(&self, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    /// Makes no call fail any more.
    pub(crate) fn mend(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Waits until it has beaten twice more.
    #[track_caller]
    pub(crate) fn beats_on(&self) {
        let before = self.machine.heartbeat().count;
        wait_until("the guest beats", || self.machine.heartbeat().count >= before + 2);
    }

    /// Asserts that it runs, with correct memory.
    #[track_caller]
    pub(crate) fn runs_whole(&self) {
        self.beats_on();
        let check = self.machine.check_from_inside(super::PATIENCE).expect("the guest answers");
        assert_eq!(check.wrong, 0, "{check:?}");
        assert_eq!(self.machine.heartbeat().regressions, 0);
        assert_eq!(self.machine.status().throttle_percent, 0);
    }

    fn is_to_fail(&self, fault: Fault) -> bool {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).contains(&fault)
    }

    fn faulty(&self, fault: Fault) -> Result<(), GuestError> {
        if self.is_to_fail(fault) {
            Err(GuestError::new(format!("{fault:?} fails for a test")))
        } else {
            Ok(())
        }
    }

    /// A word that only saving writes.
    pub(crate) fn unused_word(&self) -> u64 {
        self.machine.memory().read_obj(GuestAddress(UNUSED.start)).expect("the address is in RAM")
    }
}

impl Guest for TestGuest {
    fn name(&self) -> &str {
        &self.name
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        GuestRam::from_vm_memory(self.machine.memory()).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        let beat = self.machine.heartbeat();
        let age = Duration::from_nanos(sterna_vmm::monotonic_ns().saturating_sub(beat.at_ns));
        Some(Heartbeat { count: beat.count, age })
    }
}

impl SourceGuest for TestGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        let (config, cpu) = (self.machine.config().clone(), self.machine.cpu().clone());
        serde_json::to_vec(&Details { kind: self.machine.kind(), config, cpu }).map_err(GuestError::new)
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let own_writes = BusyLog {
            log: SoftwareLog::new(self.machine.memory()),
            memory: self.machine.memory().clone(),
            busy: self.busy.clone(),
        };
        let DirtyTracking::Kvm { vm, slots } = self.machine.dirty_tracking() else {
            return Ok(Box::new(own_writes));
        };
        let slots = slots.iter().map(|slot| KvmSlot {
            slot: slot.slot,
            guest_address: slot.guest_address,
            len_bytes: slot.len_bytes,
            host_address: slot.host_address,
        });
        let vm = vm.try_clone_to_owned().map_err(GuestError::new)?;
        let vcpus_writes = kvm_log(vm, slots.collect(), &self.ram()?)?;
        if self.forget_own_writes.load(Ordering::Relaxed) {
            return Ok(Box::new(vcpus_writes));
        }
        Ok(Box::new(EitherLog(vcpus_writes, own_writes)))
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.machine.throttle(percent).map_err(GuestError::new)
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.faulty(Fault::Pause)?;
        self.machine.pause().map_err(GuestError::new)
    }

    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        self.faulty(Fault::Save)?;
        assert!(!self.is_to_fail(Fault::DefectInSave), "for a test, this is a defect");
        if self.write_when_saved.load(Ordering::Relaxed) {
            let next = self.unused_word() + 1;
            self.machine.memory().write_obj(next, GuestAddress(UNUSED.start)).map_err(GuestError::new)?;
        }
        Ok(state.section("machine")?.write_all(&self.machine.save().map_err(GuestError::new)?)?)
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        self.faulty(Fault::Resume)?;
        self.resumed.fetch_add(1, Ordering::Relaxed);
        self.machine.resume().map_err(GuestError::new)?;
        Ok(RunOutcome::Running)
    }
}

impl DestinationGuest for TestGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        self.faulty(Fault::Load)?;
        let mut bytes = Vec::new();
        state.section("machine")?.read_to_end(&mut bytes)?;
        self.machine.load(&bytes).map_err(GuestError::new)
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.resume()
    }

    fn discard(self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// The log of a VMM with a device that writes before each harvest.
#[derive(Debug)]
struct BusyLog {
    log: SoftwareLog<SoftwareBitmap>,
    memory: sterna_vmm::GuestRam,
    busy: Arc<AtomicBool>,
}

impl DirtyLog for BusyLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        self.log.start()
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        self.log.catch_up()
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        if self.busy.load(Ordering::Relaxed) {
            for address in UNUSED.step_by(PAGE_BYTES) {
                let last: u64 = self.memory.read_obj(GuestAddress(address)).expect("the address is in RAM");
                self.memory.write_obj(last + 1, GuestAddress(address)).expect("the address is in RAM");
            }
        }
        self.log.harvest(region, dirty)
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        self.log.clear(region, first_page, bits)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.log.stop()
    }
}

/// A host at which such guests arrive.
#[derive(Debug, Default)]
pub(crate) struct TestHost {
    /// The faults of the guests that it makes.
    pub(crate) faults: Vec<Fault>,
    /// Makes machines with this many vCPUs, whatever was proposed.
    pub(crate) vcpus: Option<u8>,
    /// How often any of these guests was resumed.
    pub(crate) resumed: Arc<AtomicUsize>,
}

impl TestHost {
    pub(crate) fn times_resumed(&self) -> usize {
        self.resumed.load(Ordering::Relaxed)
    }
}

impl GuestHost for TestHost {
    type Guest = TestGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<TestGuest, Refusal> {
        let mut details: Details = serde_json::from_slice(proposal.details)
            .map_err(|error| Refusal::Incompatible(error.to_string()))?;
        details.config.vcpus = self.vcpus.unwrap_or(details.config.vcpus);
        let guest = TestGuest::of(make(details.kind, details.config));
        self.faults.iter().for_each(|&fault| guest.fail(fault));
        Ok(TestGuest { resumed: self.resumed.clone(), ..guest.named(proposal.name) })
    }
}

/// Watches a migration and acts on what happens in it.
pub(crate) struct Watch<F>(pub(crate) F);

impl<F: Fn(&Event) + Sync> Observer for Watch<F> {
    fn event(&self, event: &Event) {
        (self.0)(event);
    }
}

fn make(kind: MachineKind, config: MachineConfig) -> SharedMachine {
    let machine = match kind {
        MachineKind::Kvm => new_kvm(config),
        MachineKind::Synthetic => new_synthetic(config),
    };
    machine.expect("this machine can be made here")
}

#[expect(unsafe_code, reason = "a VMM answers for its memory slots")]
fn kvm_log(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<KvmLog, GuestError> {
    // SAFETY: the machine set these slots, without flags, before it ran; it sets and deletes no other slot as
    // long as it exists.
    unsafe { KvmLog::new(vm, slots, ram) }.map_err(GuestError::new)
}

//! A guest that only writes, and a host at which it arrives.

use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::PATIENCE;
use super::naming::{Naming, NamingLog};
use crate::dirty::{
    CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, SoftwareBitmap, SoftwareLog,
};
use crate::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, VcpuWrites,
    WriteQuota,
};
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::poison::IgnorePoison;
use crate::saved_state::{StateReader, StateWriter};
use crate::wire::Refusal;

/// The addresses of its RAM: with two lanes, the first lane carries one region and the second the other.
pub(super) const REGIONS: [u64; 2] = [0, 4 << 30];

/// Two blocks of those that are compared: the guest's busy pages are in the first, and it never writes to the
/// second again.
const REGION_BYTES: usize = 4 << 20;
const REGION_PAGES: u64 = REGION_BYTES as u64 / PAGE_BYTES;

/// How many busy pages each region has; no two are neighbours, so each is a write of its own.
pub(super) const BUSY_PAGES: u32 = 16;

/// How many pages of each region it wrote at first, and never again. They come after the busy pages.
const QUIET_PAGES: u64 = 16;

/// In each region: the page that saving writes to, and the page that a test may write to. Both come after the
/// busy pages, in this order.
const SAVED_PAGE: u64 = 100;
const SPARE_PAGE: u64 = 200;

/// Pages of the first region that a test may have written at the pause and again: more than wait for the last
/// pass.
pub(super) const REWRITTEN_PAGES: Range<u64> = 300..812;

type Memory = GuestMemoryMmap<SoftwareBitmap>;

fn address(region: usize, page: u64) -> GuestAddress {
    GuestAddress(REGIONS[region] + page * PAGE_BYTES)
}

fn busy_page(index: u32) -> u64 {
    u64::from(index) * 3
}

#[derive(Debug)]
pub(super) struct TestGuest {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    /// Shared with the host that made it.
    pub(super) seen: Arc<Seen>,
}

/// What a host's guests did, and which of their calls panic.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// How often the engine resumed or started one.
    resumed: AtomicUsize,
    panics: Mutex<Vec<&'static str>>,
    panicked: AtomicUsize,
    /// Whether the VMM runs a guest without reporting that it does.
    unsure: AtomicBool,
    errs: Mutex<Vec<&'static str>>,
    /// Whether the spare pages are written just before each harvest while the guest runs.
    writes_late: AtomicBool,
    /// Whether many pages are written just before the pause and by the save.
    rewrites: AtomicBool,
    /// How the VMM names pages, if it does.
    naming: Mutex<Option<Naming>>,
    /// Whether the VMM has a quota of writes, and what it is now.
    has_quota: AtomicBool,
    write_limit: Mutex<Option<NonZeroU64>>,
}

impl Seen {
    /// Makes these calls panic from now on, and no others.
    pub(super) fn panic_in(&self, calls: &[&'static str]) {
        *self.panics.lock().ignore_poison() = calls.to_vec();
    }

    fn enter(&self, call: &'static str) {
        let panics = self.panics.lock().ignore_poison().contains(&call);
        self.panicked.fetch_add(panics.into(), Ordering::Relaxed);
        assert!(!panics, "a defect in {call}");
    }

    /// Sets whether the VMM reports that it does not know whether its guest runs.
    pub(super) fn be_unsure(&self, unsure: bool) {
        self.unsure.store(unsure, Ordering::Relaxed);
    }

    /// Makes these calls fail from now on, and no others.
    pub(super) fn err_in(&self, calls: &[&'static str]) {
        *self.errs.lock().ignore_poison() = calls.to_vec();
    }

    fn errs_in(&self, call: &'static str) -> Result<(), String> {
        let errs = self.errs.lock().ignore_poison().contains(&call);
        if errs { Err(format!("{call} fails for a test")) } else { Ok(()) }
    }

    /// Makes the VMM name the pages to send from now on.
    pub(super) fn name_pages(&self, naming: Naming) {
        *self.naming.lock().ignore_poison() = Some(naming);
    }

    /// Sets whether the spare pages are written just before each harvest while the guest runs.
    pub(super) fn write_late(&self, writes: bool) {
        self.writes_late.store(writes, Ordering::Relaxed);
    }

    /// Makes the guest write [`REWRITTEN_PAGES`] as it is paused, and the save write them again.
    pub(super) fn rewrite(&self) {
        self.rewrites.store(true, Ordering::Relaxed);
    }

    /// Gives the VMM a quota of writes.
    pub(super) fn have_quota(&self) {
        self.has_quota.store(true, Ordering::Relaxed);
    }

    /// The quota of writes in force.
    pub(super) fn write_limit(&self) -> Option<NonZeroU64> {
        *self.write_limit.lock().ignore_poison()
    }

    /// How many calls have panicked.
    pub(super) fn times_panicked(&self) -> usize {
        self.panicked.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Shared {
    memory: Memory,
    /// The RAM that it reports once that has changed.
    replugged: Mutex<Option<Memory>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Changes of memory while a guest runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Replug {
    Plug,
    Unplug,
    Replace,
    /// As before a test.
    Restore,
}

#[derive(Debug, Default)]
struct State {
    runs: bool,
    over: bool,
    /// How often it has written all its busy pages.
    passes: u64,
    throttle_percent: u8,
    /// Its memory when it first ran.
    arrived_with: Option<Contents>,
}

/// The bytes of all RAM, region by region.
#[derive(Clone, Debug)]
pub(super) struct Contents(Vec<u8>);

impl Contents {
    pub(super) fn differing_pages(&self, other: &Self) -> usize {
        let page = usize::try_from(PAGE_BYTES).expect("pages are small");
        self.0.chunks(page).zip(other.0.chunks(page)).filter(|(ours, theirs)| ours != theirs).count()
    }
}

impl TestGuest {
    /// A guest at work.
    pub(super) fn started() -> Self {
        let guest = Self::new(Arc::default());
        for region in 0..REGIONS.len() {
            for page in 0..QUIET_PAGES {
                guest.write(region, REGION_PAGES / 2 + page * 2, page + 1);
            }
        }
        guest.shared.state().runs = true;
        guest.shared.changed.notify_all();
        guest.writes_on();
        guest
    }

    /// A guest that has never run.
    fn new(seen: Arc<Seen>) -> Self {
        let regions = REGIONS.map(|address| (GuestAddress(address), REGION_BYTES));
        let memory = Memory::from_ranges(&regions).expect("there is memory for a small guest");
        let (replugged, state, changed) = Default::default();
        let shared = Arc::new(Shared { memory, replugged, state, changed });
        let writer = thread::spawn({
            let shared = shared.clone();
            move || shared.write_on()
        });
        Self { shared, writer: Some(writer), seen }
    }

    fn write(&self, region: usize, page: u64, value: u64) {
        self.shared.memory.write_obj(value, address(region, page)).expect("the page is in RAM");
    }

    fn rewrite(&self) {
        if self.seen.rewrites.load(Ordering::Relaxed) {
            REWRITTEN_PAGES.for_each(|page| self.write(0, page, page));
        }
    }

    /// Writes to a page that the guest itself does not touch.
    pub(super) fn write_spare_page(&self, region: usize) {
        self.write(region, SPARE_PAGE, 1);
    }

    /// Waits until the guest has written every busy page once more.
    #[track_caller]
    pub(super) fn writes_on(&self) {
        let state = self.shared.state();
        // The pass in progress may be nearly over.
        let enough = state.passes + 2;
        let waiting = self.shared.changed.wait_timeout_while(state, PATIENCE, |state| state.passes < enough);
        let (state, timeout) = waiting.ignore_poison();
        drop(state);
        assert!(!timeout.timed_out(), "the guest stands still");
    }

    /// Changes the RAM that the VMM reports from now on: plugs memory, or removes the second region.
    pub(super) fn replug(&self, how: Replug) {
        let region = |address: u64| {
            let region = GuestRegionMmap::from_range(GuestAddress(address), REGION_BYTES, None);
            Arc::new(region.expect("there is memory for a region"))
        };
        let memory = &self.shared.memory;
        let without =
            || memory.remove_region(GuestAddress(REGIONS[1]), REGION_BYTES as u64).map(|(rest, _)| rest);
        let replugged = match how {
            Replug::Plug => memory.insert_region(region(8 << 30)).map(Some),
            Replug::Unplug => without().map(Some),
            Replug::Replace => without().and_then(|rest| rest.insert_region(region(REGIONS[1]))).map(Some),
            Replug::Restore => Ok(None),
        };
        *self.shared.replugged.lock().ignore_poison() = replugged.expect("there is room");
    }

    pub(super) fn is_paused(&self) -> bool {
        !self.shared.state().runs
    }

    pub(super) fn throttle_percent(&self) -> u8 {
        self.shared.state().throttle_percent
    }

    /// All of its memory. The guest must be paused.
    pub(super) fn contents(&self) -> Contents {
        assert!(self.is_paused());
        self.shared.contents()
    }

    /// Its memory when it first ran.
    pub(super) fn arrived_with(&self) -> Contents {
        self.shared.state().arrived_with.clone().expect("it was let run")
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }

    fn contents(&self) -> Contents {
        let mut bytes = vec![0; REGIONS.len() * REGION_BYTES];
        for (region, bytes) in bytes.chunks_mut(REGION_BYTES).enumerate() {
            self.memory.read_slice(bytes, address(region, 0)).expect("the region is in RAM");
        }
        Contents(bytes)
    }

    /// Adds one to the spare pages of all regions.
    fn write_spare_pages(&self) {
        for region in 0..REGIONS.len() {
            let at = address(region, SPARE_PAGE);
            let value: u64 = self.memory.read_obj(at).expect("the page is in RAM");
            self.memory.write_obj(value + 1, at).expect("the page is in RAM");
        }
    }

    /// Writes one page after the other, never the same value twice, whenever it may run.
    fn write_on(&self) {
        let mut value = 0u64;
        loop {
            for page in 0..BUSY_PAGES {
                let state = self.state();
                let waiting = self.changed.wait_while(state, |state| !state.runs && !state.over);
                // Held while it writes: a thread that paused it waits for the lock.
                let state = waiting.ignore_poison();
                if state.over {
                    return;
                }
                for region in 0..REGIONS.len() {
                    value += 1;
                    let word = value % (PAGE_BYTES / 8) * 8;
                    let at = GuestAddress(address(region, busy_page(page)).0 + word);
                    self.memory.write_obj(value, at).expect("the page is in RAM");
                }
                drop(state);
            }
            self.state().passes += 1;
            self.changed.notify_all();
            thread::sleep(Duration::from_micros(500));
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.shared.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            writer.join().expect("the guest's thread does not panic");
        }
    }
}

impl Guest for TestGuest {
    fn name(&self) -> &'static str {
        "tern"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        self.seen.enter("ram");
        let replugged = self.shared.replugged.lock().ignore_poison();
        GuestRam::from_vm_memory(replugged.as_ref().unwrap_or(&self.shared.memory)).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        self.seen.enter("heartbeat");
        None
    }
}

impl SourceGuest for TestGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        self.seen.enter("details");
        Ok(Vec::new())
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        self.seen.enter("dirty_log");
        let log = TestLog(SoftwareLog::new(&self.shared.memory), self.seen.clone(), self.shared.clone());
        let Some(naming) = *self.seen.naming.lock().ignore_poison() else { return Ok(Box::new(log)) };
        let shared = self.shared.clone();
        let pause = move || shared.state().runs = false;
        Ok(Box::new(NamingLog::new(log, naming, Box::new(pause))))
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.seen.enter("throttle");
        self.shared.state().throttle_percent = percent;
        Ok(())
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        self.seen.enter("write_quota");
        self.seen.has_quota.load(Ordering::Relaxed).then_some(self)
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.shared.state().runs = false;
        self.rewrite();
        self.seen.enter("pause");
        Ok(())
    }

    /// Writes to RAM, as the save of some device models does.
    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        self.seen.enter("save");
        if self.seen.rewrites.load(Ordering::Relaxed) {
            // Time in which what is named could be sent.
            thread::sleep(Duration::from_millis(100));
            self.rewrite();
        }
        let passes = self.shared.state().passes;
        (0..REGIONS.len()).for_each(|region| self.write(region, SAVED_PAGE, passes));
        Ok(state.section("passes")?.write_all(&passes.to_le_bytes())?)
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        self.seen.enter("resume");
        self.seen.resumed.fetch_add(1, Ordering::Relaxed);
        let mut state = self.shared.state();
        if state.arrived_with.is_none() {
            state.arrived_with = Some(self.shared.contents());
        }
        state.runs = true;
        self.shared.changed.notify_all();
        if self.seen.unsure.load(Ordering::Relaxed) {
            return Ok(RunOutcome::Unknown { reason: "its answer was lost".into() });
        }
        Ok(RunOutcome::Running)
    }
}

/// The first of its two vCPUs writes, and it does not measure what a quota takes from them.
impl WriteQuota for TestGuest {
    fn writes(&self) -> Result<Vec<VcpuWrites>, GuestError> {
        self.seen.enter("writes");
        let passes = self.shared.state().passes;
        Ok(vec![VcpuWrites { pages: passes + 1, stood_still: None }, VcpuWrites::default()])
    }

    fn limit(&self, pages_per_second: Option<NonZeroU64>) -> Result<(), GuestError> {
        self.seen.enter("limit");
        self.seen.errs_in("limit").map_err(GuestError::new)?;
        *self.seen.write_limit.lock().ignore_poison() = pages_per_second;
        Ok(())
    }
}

impl DestinationGuest for TestGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        self.seen.enter("can_arrive");
        self.seen.errs_in("can_arrive").map_err(GuestError::new)
    }

    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        self.seen.enter("load");
        if self.seen.errs_in("load").is_err() {
            // It leaves the state as it is.
            return Ok(());
        }
        let mut passes = [0; 8];
        state.section("passes")?.read_exact(&mut passes)?;
        self.shared.state().passes = u64::from_le_bytes(passes);
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.resume()
    }

    fn discard(self) -> Result<(), GuestError> {
        self.seen.errs_in("discard").map_err(GuestError::new)
    }
}

/// A dirty log with calls that may panic like others of the VMM.
#[derive(Debug)]
pub(super) struct TestLog(SoftwareLog<SoftwareBitmap>, Arc<Seen>, Arc<Shared>);

impl DirtyLog for TestLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        self.1.enter("start");
        self.0.start()
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        self.1.enter("catch_up");
        if self.1.writes_late.load(Ordering::Relaxed) {
            self.2.write_spare_pages();
        }
        self.0.catch_up()
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        self.1.enter("harvest");
        self.1.errs_in("harvest").map_err(DirtyError::vmm)?;
        self.0.harvest(region, dirty)
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        self.1.enter("clear");
        self.0.clear(region, first_page, bits)
    }

    fn peek(&self, uncleared: u64) -> Result<Option<u64>, DirtyError> {
        self.1.enter("peek");
        self.0.peek(uncleared)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.1.enter("stop");
        self.0.stop()
    }
}

/// A host at which such guests arrive.
#[derive(Debug, Default)]
pub(super) struct TestHost {
    pub(super) seen: Arc<Seen>,
}

impl TestHost {
    /// How often a guest at this host was run.
    pub(super) fn times_resumed(&self) -> usize {
        self.seen.resumed.load(Ordering::Relaxed)
    }
}

impl GuestHost for TestHost {
    type Guest = TestGuest;

    fn prepare(&self, _proposal: &Proposal<'_>) -> Result<TestGuest, Refusal> {
        self.seen.enter("prepare");
        Ok(TestGuest::new(self.seen.clone()))
    }
}

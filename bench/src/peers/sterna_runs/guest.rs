//! A guest without a machine: RAM, a log of its writes, and for a busy guest a thread that writes.
#![expect(unsafe_code, reason = "madvise(2), to make all pages of RAM at once")]

use std::fmt::Display;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sterna::dirty::{CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, SoftwareLog};
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, WriteQuota,
};
use sterna::memory::{GuestRam, PAGE_BYTES};
use sterna::saved_state::{StateReader, StateWriter};
use sterna::wire::Refusal;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::peers::failure::Failure;
use crate::peers::migration::LOOP_BYTES;

pub(super) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// The content of each page of a guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// None: no page was ever touched.
    Untouched,
    /// Zeros that were written.
    Zeros,
    /// The page's own address, and zeros.
    Addresses,
}

/// The pages that a log reports as dirty at the end of each round, in turn; none after the last entry.
#[derive(Clone, Debug)]
pub(super) struct Script(pub(super) Vec<Pages>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    All,
    EverySecond,
}

#[derive(Debug)]
pub(super) struct BenchGuest {
    memory: Memory,
    /// The file mapped as RAM.
    file: File,
    script: Option<Script>,
    writer: Option<Writer>,
}

impl BenchGuest {
    pub(super) fn new(ram_bytes: u64, content: Content) -> Result<Self, Failure> {
        let (memory, file) = memory(ram_bytes).map_err(Failure::Sterna)?;
        if content != Content::Untouched {
            populate(&memory);
            for address in (0..ram_bytes).step_by(4096) {
                let word = if content == Content::Zeros { 0 } else { address | 1 };
                memory.write_obj(word, GuestAddress(address)).map_err(|error| {
                    Failure::Sterna(format!("the guest's RAM cannot be written: {error}"))
                })?;
            }
        }
        Ok(Self { memory, file, script: None, writer: None })
    }

    /// Touches the pages of the first `bytes` bytes of its RAM.
    pub(super) fn touch(&self, bytes: u64) -> Result<(), Failure> {
        for address in (0..bytes).step_by(4096) {
            self.memory
                .write_obj(address | 1, GuestAddress(address))
                .map_err(|error| Failure::Sterna(format!("the guest's RAM cannot be written: {error}")))?;
        }
        Ok(())
    }

    /// The same guest with a log that follows a script.
    pub(super) fn with_script(self, script: Script) -> Self {
        Self { script: Some(script), ..self }
    }

    /// The same guest, adding one to a byte of each page of [`LOOP_BYTES`] for ever.
    pub(super) fn busy(self) -> Self {
        Self { writer: Some(Writer::start(self.memory.clone())), ..self }
    }

    /// The file behind its RAM, which can be read without a fault for each page.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Its write speed, in MB/s.
    pub(super) fn speed(&self, over: Duration) -> f64 {
        let Some(writer) = &self.writer else { return 0.0 };
        let (before, began) = (writer.shared.pages.load(Ordering::Relaxed), Instant::now());
        thread::sleep(over);
        let pages = writer.shared.pages.load(Ordering::Relaxed) - before;
        pages as f64 * PAGE_BYTES as f64 / 1e6 / began.elapsed().as_secs_f64()
    }
}

/// Allocates all pages at once, where the kernel can (Linux 5.14): in User-mode Linux a fault takes a hundred
/// times as long as writing the page.
fn populate(memory: &Memory) {
    for region in memory.iter() {
        let (address, len) = (region.as_ptr().cast(), region.size());
        // SAFETY: the region is mapped, writable and of this length; allocating its pages changes none of
        // their bytes.
        let _ = unsafe { libc::madvise(address, len, libc::MADV_POPULATE_WRITE) };
    }
}

/// A memfd, as a VMM has.
fn memory(ram_bytes: u64) -> Result<(Memory, File), String> {
    let failed = |error: &dyn Display| format!("no memory for a guest: {error}");
    let file = rustix::fs::memfd_create("sterna-bench-ram", rustix::fs::MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|error| failed(&error))?;
    file.set_len(ram_bytes).map_err(|error| failed(&error))?;
    let mapped = FileOffset::new(file.try_clone().map_err(|error| failed(&error))?, 0);
    let len = usize::try_from(ram_bytes).map_err(|error| failed(&error))?;
    let memory = Memory::from_ranges_with_files([(GuestAddress(0), len, Some(mapped))]);
    Ok((memory.map_err(|error| failed(&error))?, file))
}

impl Guest for BenchGuest {
    fn name(&self) -> &'static str {
        "bench"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        GuestRam::from_vm_memory(&self.memory).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for BenchGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(match &self.script {
            Some(script) => Box::new(ScriptedLog { script: script.clone(), harvests: AtomicU64::new(0) }),
            None => Box::new(SoftwareLog::new(&self.memory)),
        })
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        if let Some(writer) = &self.writer {
            writer.shared.throttle_percent.store(percent.min(99), Ordering::Relaxed);
        }
        Ok(())
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        if let Some(writer) = &self.writer {
            writer.pause();
        }
        Ok(())
    }

    fn save(&self, _state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        if let Some(writer) = &self.writer {
            writer.resume();
        }
        Ok(RunOutcome::Running)
    }
}

impl DestinationGuest for BenchGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn load(&self, _state: &mut StateReader<'_>) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.resume()
    }

    fn discard(self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Makes guests with untouched RAM for arrivals.
#[derive(Debug)]
pub(super) struct BenchHost;

impl GuestHost for BenchHost {
    type Guest = BenchGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<BenchGuest, Refusal> {
        BenchGuest::new(proposal.ram.total_bytes(), Content::Untouched)
            .map_err(|error| Refusal::Incompatible(error.to_string()))
    }
}

/// A log that follows a script.
#[derive(Debug)]
struct ScriptedLog {
    script: Script,
    harvests: AtomicU64,
}

impl DirtyLog for ScriptedLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, _region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        let harvests = usize::try_from(self.harvests.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX);
        // The first harvest precedes the first round and adds no pages to it.
        let ended = harvests.checked_sub(1).and_then(|round| self.script.0.get(round));
        match ended {
            Some(Pages::All) => dirty.mark(0..dirty.pages()),
            Some(Pages::EverySecond) => {
                (0..dirty.words().len()).for_each(|word| dirty.mark_word(word, 0x5555_5555_5555_5555));
            }
            None => {}
        }
        Ok(())
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// The thread of a busy guest.
#[derive(Debug)]
struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Read before each page.
    wanted: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    throttle_percent: AtomicU8,
    pages: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    pause: bool,
    quit: bool,
    is_paused: bool,
}

/// How long a throttled guest works before it pauses for its share.
const SLICE: Duration = Duration::from_millis(2);

/// How many pages are written between two looks at the clock.
const PAGES_PER_LOOK: u64 = 1024;

/// The beginning of the written part: the same as in QEMU's guest.
const LOOP_FROM: u64 = 16 << 20;

impl Writer {
    fn start(memory: Memory) -> Self {
        let shared = Arc::<Shared>::default();
        let working = shared.clone();
        let thread = thread::spawn(move || working.work(&memory));
        Self { shared, thread: Some(thread) }
    }

    fn pause(&self) {
        let mut state = self.shared.lock();
        state.pause = true;
        self.shared.wanted.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        while !state.is_paused {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn resume(&self) {
        self.shared.lock().pause = false;
        self.shared.changed.notify_all();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.wanted.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, memory: &Memory) {
        let mut began = Instant::now();
        for page in (0..LOOP_BYTES / PAGE_BYTES).cycle() {
            if self.wanted.load(Ordering::Acquire) && self.heed() {
                return;
            }
            let address = GuestAddress(LOOP_FROM + page * PAGE_BYTES);
            // The loop lies in RAM, so neither access can fail.
            let byte: u8 = memory.read_obj(address).unwrap_or(0);
            let _ = memory.write_obj(byte.wrapping_add(1), address);
            let pages = self.pages.fetch_add(1, Ordering::Relaxed);
            if pages.is_multiple_of(PAGES_PER_LOOK) {
                began = self.slow_down(began);
            }
        }
    }

    /// Stands still while paused; returns whether to end.
    fn heed(&self) -> bool {
        let mut state = self.lock();
        while state.pause && !state.quit {
            state.is_paused = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_paused = false;
        self.wanted.store(state.quit, Ordering::Release);
        state.quit
    }

    /// Sleeps its share of the time since `began`, if that was long enough; returns the time at which work
    /// resumed.
    fn slow_down(&self, began: Instant) -> Instant {
        let percent = u32::from(self.throttle_percent.load(Ordering::Relaxed));
        let worked = began.elapsed();
        if percent == 0 || worked < SLICE {
            return if percent == 0 { Instant::now() } else { began };
        }
        let deadline = Instant::now() + worked * percent / (100 - percent);
        let mut state = self.lock();
        while !state.pause && !state.quit {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Instant::now()
    }
}

#[cfg(test)]
mod tests {
    use sterna::dirty::DirtyBitmap;

    use super::*;

    #[test]
    fn a_busy_guest_stands_still_when_it_is_paused_and_goes_on_after() {
        let guest = BenchGuest::new(128 << 20, Content::Addresses).unwrap().busy();
        let pages = || guest.writer.as_ref().unwrap().shared.pages.load(Ordering::SeqCst);
        for throttle in [0, 90] {
            guest.throttle(throttle).unwrap();
            guest.pause().unwrap();
            let paused_at = pages();
            thread::sleep(Duration::from_millis(20));
            assert_eq!(pages(), paused_at);
            guest.resume().unwrap();
            while pages() == paused_at {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn what_a_busy_guest_writes_is_logged() {
        let guest = BenchGuest::new(128 << 20, Content::Addresses).unwrap().busy();
        let log = guest.dirty_log().unwrap();
        while guest.writer.as_ref().unwrap().shared.pages.load(Ordering::SeqCst) < LOOP_BYTES / PAGE_BYTES {
            thread::sleep(Duration::from_millis(1));
        }
        guest.pause().unwrap();
        let mut dirty = DirtyBitmap::new(&guest.ram().unwrap().layout());
        dirty.harvest(&*log).unwrap();
        let first = usize::try_from(LOOP_FROM / PAGE_BYTES / 64).unwrap();
        assert!(dirty.regions()[0].words()[first..][..400].iter().all(|&word| word == u64::MAX));
    }
}

//! A guest that writes a part of its memory over and over, and the rest little by little: its hot pages wait
//! for the last round.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sterna::convergence::Limits;
use sterna::destination::{self, Receiver};
use sterna::dirty::{DirtyLog, SoftwareBitmap, SoftwareLog};
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, WriteQuota,
};
use sterna::memory::{GuestRam, PAGE_BYTES};
use sterna::progress::Report;
use sterna::saved_state::{StateReader, StateWriter};
use sterna::source::{LimitsHandle, MigrationError, Options, Verify, migrate};
use sterna::state::HostState;
use sterna::transport::Transports;
use sterna::wire::Refusal;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;

/// What a guest has and writes.
#[derive(Clone, Copy, Debug)]
struct Work {
    ram_bytes: u64,
    /// Written over and over, from the start of its RAM.
    hot_bytes: u64,
    /// How much of the rest it writes in a second.
    cold_bytes_per_second: u64,
}

/// A guest that only writes.
struct HotGuest {
    memory: GuestMemoryMmap<SoftwareBitmap>,
    state: Arc<Mutex<State>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    runs: bool,
    is_over: bool,
    /// Its memory when it was last paused, or first ran.
    seen: Vec<u8>,
}

impl HotGuest {
    fn new(ram_bytes: u64) -> Self {
        let len = usize::try_from(ram_bytes).expect("it fits a 64-bit machine");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).expect("address space");
        Self { memory, state: Arc::default(), threads: Vec::new() }
    }

    /// All of its memory is written before it runs.
    fn at_work(work: Work) -> Self {
        let mut guest = Self::new(work.ram_bytes);
        let pages = work.ram_bytes / PAGE_BYTES;
        (0..pages)
            .for_each(|page| guest.memory.write_obj(1u64, GuestAddress(page * PAGE_BYTES)).expect("RAM"));
        guest.state().runs = true;
        let hot_pages = work.hot_bytes / PAGE_BYTES;
        guest.write_on(0..hot_pages, None);
        guest.write_on(hot_pages..pages, Some(work.cold_bytes_per_second / PAGE_BYTES));
        guest
    }

    /// Writes these pages again and again, as fast as it can or so many a second.
    fn write_on(&mut self, pages: std::ops::Range<u64>, rate: Option<u64>) {
        let (memory, state) = (self.memory.clone(), self.state.clone());
        self.threads.push(thread::spawn(move || {
            let began = Instant::now();
            let mut written = 0u64;
            for page in pages.clone().cycle() {
                if let Some(rate) = rate {
                    let due = Duration::from_secs_f64(written as f64 / rate.max(1) as f64);
                    thread::sleep(due.saturating_sub(began.elapsed()));
                }
                loop {
                    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
                    if state.is_over {
                        return;
                    }
                    if state.runs {
                        written += 1;
                        memory.write_obj(written, GuestAddress(page * PAGE_BYTES)).expect("it is in RAM");
                        break;
                    }
                    drop(state);
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn contents(&self) -> Vec<u8> {
        let len: u64 = self.memory_bytes();
        let mut bytes = vec![0; usize::try_from(len).expect("it fits")];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).expect("it is in RAM");
        bytes
    }

    fn memory_bytes(&self) -> u64 {
        GuestRam::from_vm_memory(&self.memory).expect("it is RAM").layout().total_bytes()
    }
}

impl Drop for HotGuest {
    fn drop(&mut self) {
        self.state().is_over = true;
        self.threads.drain(..).for_each(|thread| thread.join().expect("its threads do not panic"));
    }
}

impl Guest for HotGuest {
    fn name(&self) -> &'static str {
        "tern"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        GuestRam::from_vm_memory(&self.memory).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for HotGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.memory_bytes().to_le_bytes().to_vec())
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(Box::new(SoftwareLog::new(&self.memory)))
    }

    fn throttle(&self, _percent: u8) -> Result<(), GuestError> {
        Err(GuestError::new("it cannot be slowed"))
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.state().runs = false;
        Ok(())
    }

    fn save(&self, _state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        self.state().runs = true;
        Ok(RunOutcome::Running)
    }
}

impl DestinationGuest for HotGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn load(&self, _state: &mut StateReader<'_>) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        let seen = self.contents();
        self.state().seen = seen;
        Ok(RunOutcome::Running)
    }

    fn discard(self) -> Result<(), GuestError> {
        Ok(())
    }
}

struct HotHost;

impl GuestHost for HotHost {
    type Guest = HotGuest;

    fn prepare(&self, proposal: &Proposal<'_>) -> Result<HotGuest, Refusal> {
        Ok(HotGuest::new(proposal.ram.total_bytes()))
    }
}

/// Moves such a guest over TCP; asserts that its memory arrives as it was when it was paused.
fn moved(work: Work, limits: Limits, verify: Verify) -> Result<Report, MigrationError> {
    let state = HostState::lost_with_this_process;
    let claim = state().start("tern", false).expect("the name is free");
    let receiver = Receiver::bind("127.0.0.1:0".parse().expect("an address"), state()).expect("a free port");
    let to = receiver.local_address().expect("a bound socket has an address").to_string();
    let guest = HotGuest::at_work(work);
    let transports = Transports::default().only("tcp").expect("it is in the list");
    let options = Options { transports, limits: LimitsHandle::new(limits), verify, ..Options::default() };
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&HotHost, &destination::Options::default(), &()));
        let report = migrate(&guest, &claim, &to, &options, &());
        let arrived = receiving.join().expect("the destination does not panic");
        let report = report?;
        let arrived = arrived.expect("the guest arrives").guest;
        assert!(arrived.contents() == guest.contents(), "its memory is that of the source");
        Ok(report)
    })
}

fn limits(downtime_ms: u64, megabytes_per_second: u64) -> Limits {
    Limits {
        downtime: Duration::from_millis(downtime_ms),
        bandwidth_max: NonZeroU64::new(megabytes_per_second * 1_000_000),
        ..Limits::default()
    }
}

fn waiting_pages(report: &Report) -> Vec<u64> {
    let rounds = report.rounds.iter().map(|round| serde_json::to_value(round).expect("it is a report"));
    rounds.map(|round| round["waiting_pages"].as_u64().unwrap_or(0)).collect()
}

/// Hot pages take 0.13 s on a link of 30 MB/s, cold ones come at 20 MB/s: rounds get smaller by a third.
#[test]
fn hot_pages_wait_while_the_rest_converges_and_all_arrive() {
    let work = Work { ram_bytes: 32 * MIB, hot_bytes: 4 * MIB, cold_bytes_per_second: 20_000_000 };
    let report = moved(work, limits(1000, 30), Verify::Final).expect("the guest moves");
    let waiting = waiting_pages(&report);
    println!("{waiting:?}, {} bytes", report.bytes_sent);
    assert_eq!(waiting[0], 0, "no page was written in two rounds yet");
    assert!(waiting.iter().any(|&pages| pages > 0), "{waiting:?}");
    let (last, before) = report.rounds.split_last().expect("it has rounds");
    assert!(before.last().expect("it has more").waiting_pages <= last.pages, "{waiting:?}");
}

/// `cargo test --release --test hot_pages -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes"]
fn in_a_hundred_migrations_nothing_is_wrong() {
    for index in 0..100 {
        let hot_bytes = (1 + index % 7) * MIB / 2;
        let work = Work { ram_bytes: 16 * MIB, hot_bytes, cold_bytes_per_second: (index % 5) * 8_000_000 };
        // On a busy processor some are too fast for the link.
        let if_stuck = "stop".parse().expect("a policy");
        let limits = Limits { if_stuck, ..limits(80 + index % 6 * 20, 40) };
        let report = moved(work, limits, Verify::Full).expect("the guest moves");
        println!(
            "{index}: {:?} pages waited, {} rounds",
            waiting_pages(&report).iter().max(),
            report.rounds.len()
        );
    }
}

/// The same, of one guest on a link of 110 MB/s: bytes sent, round by round.
#[test]
#[ignore = "a measurement"]
fn what_a_guest_with_a_hot_set_takes() {
    let number =
        |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let work = Work {
        ram_bytes: 512 * MIB,
        hot_bytes: 64 * MIB,
        cold_bytes_per_second: number("COLD", 30) * 1_000_000,
    };
    let limits = Limits {
        rounds_max: 30,
        throttle_max_percent: 0,
        if_stuck: std::env::var("STUCK").unwrap_or("throttle".into()).parse().expect("policies"),
        ..limits(number("DOWNTIME", 950), 110)
    };
    let began = Instant::now();
    match moved(work, limits, Verify::Off) {
        Ok(report) => println!(
            "{} rounds, {} MB in {:.1} s, downtime {:.0} ms; sent {:?} MB; waiting {:?}",
            report.rounds.len(),
            report.bytes_sent / 1_000_000,
            began.elapsed().as_secs_f64(),
            report.downtime_ms,
            report.rounds.iter().map(|round| round.bytes / 1_000_000).collect::<Vec<_>>(),
            waiting_pages(&report),
        ),
        Err(error) => println!("{error}: {}, after {:.1} s", error.cause, began.elapsed().as_secs_f64()),
    }
}

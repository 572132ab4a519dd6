//! Moving a guest that uses little of its RAM allocates no more memory at either host.

mod common;

use std::sync::Mutex;
use std::thread;

use common::{PATIENCE, TestGuest, TestHost, Watch, in_a_lab};
use sterna::convergence::Limits;
use sterna::destination::Receiver;
use sterna::dirty::{DirtyLog, SoftwareBitmap, SoftwareLog};
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, WriteQuota,
};
use sterna::host::available_memory_bytes;
use sterna::memory::GuestRam;
use sterna::progress::Event;
use sterna::saved_state::{StateReader, StateWriter};
use sterna::source::{LimitsHandle, Options, migrate};
use sterna::state::HostState;
use sterna::transport::Transports;
use sterna::transport::rdma::RdmaPath;
use sterna::trust::Security;
use sterna::wire::Refusal;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 1024 * MIB;
const STRIDE_BYTES: u64 = 64 * MIB;

/// What a migration may add to the memory of a guest with 1 GiB.
const MORE_BYTES: u64 = 8 * MIB;

#[test]
fn over_tcp_a_guest_with_a_page_in_each_64_mib_takes_the_memory_that_it_took_before() {
    moves_within_its_memory(RAM_BYTES, "tcp", "127.0.0.1:0");
}

#[test]
fn by_rdma_a_guest_with_a_page_in_each_64_mib_takes_the_memory_that_it_took_before() {
    let Some(listen) = rdma_or_skip() else { return };
    moves_within_its_memory(RAM_BYTES, "rdma", &listen);
}

#[test]
fn a_guest_with_more_ram_than_is_available_moves_by_rdma_and_no_more_is_pinned_than_is_available() {
    let Some(listen) = rdma_or_skip() else { return };
    let available_bytes = available_memory_bytes().expect("Linux says what is available");
    let ram_bytes = available_bytes.next_multiple_of(1 << 30) * 2;
    if ram_bytes > 500 << 30 {
        println!("skipped: the test's guest cannot have more RAM than this machine");
        return;
    }
    let via = moves_within_its_memory(ram_bytes, "rdma", &listen);
    println!("{via}");
    // The two ends are on one host, so the second finds a little less available.
    let (_, pinned) = via.split_once(", at most ").expect("it says how much may be pinned");
    let (pinned, why) = pinned.split_once(" MiB pinned: ").expect("it says why");
    let reasons = ["the memory that is available here", "what the destination may pin"];
    assert!(reasons.iter().any(|reason| why.starts_with(reason)), "{via}");
    let pinned_mib: u64 = pinned.parse().expect("a number");
    assert!(pinned_mib * MIB < available_bytes, "{via}, of {available_bytes} bytes");
}

/// An address at which a destination can listen.
fn rdma_or_skip() -> Option<String> {
    let Some(address) = RdmaPath::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!("skipped: no RDMA device on this machine. With one: `ci/lab uml cargo test --test sparse`");
        return None;
    };
    Some(format!("{address}:0"))
}

/// A touched page stays allocated, so the memory after the migration is the most that it had. Returns the
/// transport's description.
fn moves_within_its_memory(ram_bytes: u64, transport: &str, listen: &str) -> String {
    let receiver = Receiver::bind(listen.parse().expect("an address"), HostState::lost_with_this_process())
        .expect("a free port");
    let receiver = receiver.protected_by(Security::insecure());
    let to = receiver.local_address().expect("a bound socket has an address").to_string();
    let claim = HostState::lost_with_this_process().start("tern", false).expect("the name is free");
    let (host, guest) = (TestHost::default(), TestGuest::started_sparse(ram_bytes, STRIDE_BYTES));
    let before = guest.resident_bytes();
    assert!(before < 32 * MIB, "it is sparse: {before}");

    // Other work on the same processors may slow the switch.
    let limits = Limits { downtime: PATIENCE, ..Limits::default() };
    let options = Options {
        transports: only(transport),
        limits: LimitsHandle::new(limits),
        security: Security::insecure(),
        ..Options::default()
    };
    let via = Mutex::new(String::new());
    let watch = Watch(|event: &Event| {
        if let Event::Connected { via: way, .. } = event {
            via.lock().expect("nobody panics").clone_from(way);
        }
    });
    let (arrival, report) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receiver.receive(&host, &sterna::destination::Options::default(), &()).expect("the guest arrives")
        });
        let report = migrate(&guest, &claim, &to, &options, &watch).expect("the guest moves");
        (receiving.join().expect("the destination does not panic"), report)
    });
    assert_eq!(report.transport, transport);
    arrival.guest.runs_whole();
    for address in guest.scattered(STRIDE_BYTES) {
        let word: u64 = arrival.guest.machine.memory().read_obj(GuestAddress(address)).expect("it is in RAM");
        assert_eq!(word, address);
    }
    let after = [&guest, &arrival.guest].map(TestGuest::resident_bytes);
    println!("before {} KiB, after it {} and {} KiB", before >> 10, after[0] >> 10, after[1] >> 10);
    let more = MORE_BYTES * ram_bytes / RAM_BYTES;
    assert!(after.iter().all(|&after| after <= before + more), "{before} before, {after:?} after");
    via.into_inner().expect("nobody panics")
}

/// The engine finds the pages in this process's mappings: anonymous memory has no file to ask.
#[test]
fn by_rdma_a_guest_of_anonymous_memory_takes_the_memory_that_it_took_before() {
    let Some(listen) = rdma_or_skip() else { return };
    let state = HostState::lost_with_this_process;
    let claim = state().start("tern", false).expect("the name is free");
    let receiver = Receiver::bind(listen.parse().expect("an address"), state()).expect("a free port");
    let receiver = receiver.protected_by(Security::insecure());
    let to = receiver.local_address().expect("a bound socket has an address").to_string();
    let guest = AnonymousGuest::new();
    for address in AnonymousGuest::used() {
        guest.0.write_obj(address, GuestAddress(address)).expect("the address is in RAM");
    }
    let before = anonymous_kib();
    let limits = Limits { downtime: PATIENCE, ..Limits::default() };
    let options = Options {
        transports: only("rdma"),
        limits: LimitsHandle::new(limits),
        security: Security::insecure(),
        ..Options::default()
    };
    let arrived = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receiver
                .receive(&AnonymousHost, &sterna::destination::Options::default(), &())
                .expect("the guest arrives")
        });
        migrate(&guest, &claim, &to, &options, &Watch(|_: &Event| {})).expect("the guest moves");
        receiving.join().expect("the destination does not panic").guest
    });
    let after = anonymous_kib();
    for address in AnonymousGuest::used() {
        let word: u64 = arrived.0.read_obj(GuestAddress(address)).expect("it is in RAM");
        assert_eq!(word, address);
    }
    println!("before {before} KiB, after it {after} KiB, of both ends together");
    assert!(after <= before + 2 * MORE_BYTES / 1024, "{before} before, {after} after");
}

/// Anonymous memory of this process, in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux says it");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// A guest that stands still.
struct AnonymousGuest(GuestMemoryMmap<SoftwareBitmap>);

impl AnonymousGuest {
    fn new() -> Self {
        let len = usize::try_from(RAM_BYTES).expect("it fits a 64-bit machine");
        Self(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).expect("address space"))
    }

    fn used() -> impl Iterator<Item = u64> {
        (0..RAM_BYTES / STRIDE_BYTES).map(|index| index * STRIDE_BYTES + STRIDE_BYTES / 2)
    }
}

impl Guest for AnonymousGuest {
    fn name(&self) -> &'static str {
        "tern"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        GuestRam::from_vm_memory(&self.0).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for AnonymousGuest {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(Box::new(SoftwareLog::new(&self.0)))
    }

    fn throttle(&self, _percent: u8) -> Result<(), GuestError> {
        Ok(())
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save(&self, _state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        Ok(RunOutcome::Running)
    }
}

impl DestinationGuest for AnonymousGuest {
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

struct AnonymousHost;

impl GuestHost for AnonymousHost {
    type Guest = AnonymousGuest;

    fn prepare(&self, _proposal: &Proposal<'_>) -> Result<AnonymousGuest, Refusal> {
        Ok(AnonymousGuest::new())
    }
}

/// A choice by name.
fn only(transport: &str) -> Transports {
    Transports::default().only(transport).expect("it is in the list")
}

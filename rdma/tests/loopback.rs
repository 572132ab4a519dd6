//! Two queue pairs of one process on a real device: soft-RoCE in the labs, otherwise an adapter.

mod common;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use common::{End, Memory, address, connected, device_or_skip};
use sterna_rdma::{
    Access, Completion, CompletionKind, CompletionQueue, CompletionStatus, ConnectOptions, Device,
    EndpointError, Error, GidChoice, Library, Mapping, MemoryRegion, PeerAccess, PostError, ProtectionDomain,
    RemoteKey, Transfer, TransferError, WriteList,
};

const PAGE_BYTES: usize = 4096;

/// Bytes that differ from page to page and within a page.
fn pattern(len_bytes: usize) -> Vec<u8> {
    (0..len_bytes).map(|index| (index / PAGE_BYTES * 31 + index * 7).to_le_bytes()[0]).collect()
}

/// A write of one page to the same place of the peer's region.
fn page<'a>(index: usize, from: &'a MemoryRegion, to: &MemoryRegion) -> Transfer<'a> {
    Transfer {
        region: from,
        offset_bytes: index * PAGE_BYTES,
        len_bytes: PAGE_BYTES,
        remote_address: to.address() + (index * PAGE_BYTES) as u64,
        remote_key: to.remote_key(),
        id: index as u64,
        signalled: true,
    }
}

#[test]
fn linked_writes_with_one_signal_arrive() {
    const PAGES: usize = 1024;
    let Some(device) = device_or_skip() else { return };
    let (mut source, destination) = connected(&device, PeerAccess::Write);
    let (from, to) = (Memory::new(PAGES * PAGE_BYTES), Memory::new(PAGES * PAGE_BYTES));
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, Access::RemoteWrite));
    let mut list = WriteList::with_capacity(PAGES);

    // After each post the list must be reusable, whatever part of it was filled.
    for (count, seed) in [(PAGES, 1), (PAGES / 3, 2), (PAGES, 3)] {
        let bytes: Vec<u8> = pattern(PAGES * PAGE_BYTES).iter().map(|byte| byte ^ seed).collect();
        let before = to.read(0, PAGES * PAGE_BYTES);
        from.write(0, &bytes);
        for index in 0..count {
            let write = Transfer { signalled: index + 1 == count, ..page(index, &from_region, &to_region) };
            list.push(write).expect("the list has room");
        }
        source.queue_pair.post_writes(&mut list).expect("the list is posted");
        assert!(list.is_empty());

        let completions = source.take(1);
        assert_eq!(completions[0].id, count as u64 - 1);
        assert_eq!(completions[0].queue_pair, source.queue_pair.number());
        assert_eq!(completions[0].result, Ok(CompletionKind::Write));
        let after = to.read(0, PAGES * PAGE_BYTES);
        assert!(after[..count * PAGE_BYTES] == bytes[..count * PAGE_BYTES], "what was sent is there");
        assert!(
            after[count * PAGE_BYTES..] == before[count * PAGE_BYTES..],
            "what was not sent is untouched"
        );
    }
    let more = source.completions.poll(&mut [Completion::BLANK; 4]).expect("the queue works");
    assert_eq!(more, 0, "one signal, one completion");
}

#[test]
fn an_immediate_is_seen_after_the_writes_before_it() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, mut destination) = connected(&device, PeerAccess::Write);
    let (from, to) = (Memory::new(PAGE_BYTES), Memory::new(PAGE_BYTES));
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, Access::RemoteWrite));
    from.write(0, &pattern(PAGE_BYTES));
    destination.queue_pair.post_receive(77).expect("a receive is posted");

    let mut list = WriteList::with_capacity(1);
    let write = Transfer { signalled: false, ..page(0, &from_region, &to_region) };
    list.push(write).expect("the list has room");
    source.queue_pair.post_writes(&mut list).expect("the list is posted");
    source.queue_pair.post_write_immediate(0x00c0_ffee, 5).expect("the immediate is posted");

    let received = destination.take(1)[0];
    assert_eq!((received.id, received.queue_pair), (77, destination.queue_pair.number()));
    let expected = CompletionKind::WriteImmediateReceived { immediate: 0x00c0_ffee, len_bytes: 0 };
    assert_eq!(received.result, Ok(expected));
    assert_eq!(to.read(0, PAGE_BYTES), pattern(PAGE_BYTES));
    assert_eq!(
        source.take(1)[0],
        Completion { id: 5, queue_pair: source.queue_pair.number(), result: Ok(CompletionKind::Write) }
    );
}

#[test]
fn a_read_brings_the_peers_memory() {
    let Some(device) = device_or_skip() else { return };
    let (mut reader, owner) = connected(&device, PeerAccess::Read);
    let (into, of) = (Memory::new(PAGE_BYTES), Memory::new(PAGE_BYTES));
    of.write(0, &pattern(PAGE_BYTES));
    let (into_region, of_region) =
        (reader.register(&into, Access::LocalWrite), owner.register(&of, Access::RemoteRead));
    reader.queue_pair.post_read(page(0, &into_region, &of_region)).expect("the read is posted");
    assert!(matches!(reader.succeed(1)[..], [CompletionKind::Read { .. }]));
    assert_eq!(into.read(0, PAGE_BYTES), pattern(PAGE_BYTES));

    let sealed = reader.register(&into, Access::LocalRead);
    let result = reader.queue_pair.post_read(page(0, &sealed, &of_region));
    assert!(matches!(
        result,
        Err(PostError::Transfer(TransferError::NotWritable { access: Access::LocalRead }))
    ));
}

/// The peer refuses and writes nothing, and the queue pair flushes what follows.
fn refused_with(
    device: &Arc<Device>,
    peer_access: PeerAccess,
    access: Access,
    spoil: impl Fn(&mut Transfer<'_>),
) {
    let (mut source, destination) = connected(device, peer_access);
    let (from, to) = (Memory::new(2 * PAGE_BYTES), Memory::new(2 * PAGE_BYTES));
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, access));
    from.write(0, &pattern(2 * PAGE_BYTES));
    let mut list = WriteList::with_capacity(2);
    let mut spoilt = page(0, &from_region, &to_region);
    spoil(&mut spoilt);
    list.push(spoilt).expect("the list has room");
    list.push(page(1, &from_region, &to_region)).expect("the list has room");
    source.queue_pair.post_writes(&mut list).expect("the list is posted");

    let statuses: Vec<_> = source
        .take(2)
        .into_iter()
        .map(|completion| completion.result.map_err(|error| error.status))
        .collect();
    assert!(
        matches!(statuses[0], Err(CompletionStatus::RemoteAccess | CompletionStatus::RemoteInvalidRequest)),
        "{statuses:?}"
    );
    assert_eq!(statuses[1], Err(CompletionStatus::Flushed));
    assert_eq!(to.read(0, 2 * PAGE_BYTES), vec![0; 2 * PAGE_BYTES]);
}

#[test]
fn a_wrong_key_is_a_remote_access_error() {
    let Some(device) = device_or_skip() else { return };
    refused_with(&device, PeerAccess::Write, Access::RemoteWrite, |write| {
        write.remote_key = RemoteKey::from_raw(!write.remote_key.to_raw());
    });
}

#[test]
fn a_range_past_the_peers_region_is_refused() {
    let Some(device) = device_or_skip() else { return };
    refused_with(&device, PeerAccess::Write, Access::RemoteWrite, |write| {
        write.remote_address += 2 * PAGE_BYTES as u64 - 1;
    });
}

#[test]
fn a_region_without_remote_access_cannot_be_written() {
    let Some(device) = device_or_skip() else { return };
    refused_with(&device, PeerAccess::Write, Access::LocalWrite, |_| {});
}

#[test]
fn a_queue_pair_without_peer_access_lets_no_write_in() {
    let Some(device) = device_or_skip() else { return };
    refused_with(&device, PeerAccess::None, Access::RemoteWrite, |_| {});
}

#[test]
fn a_wait_for_nothing_ends_with_nothing() {
    let Some(device) = device_or_skip() else { return };
    let completions = CompletionQueue::new(&device, 4).expect("a completion queue");
    let mut into = [Completion::BLANK; 4];
    for timeout_ms in [0, 1, 30] {
        assert_eq!(
            completions.wait(&mut into, Duration::from_millis(timeout_ms)).expect("the queue works"),
            0
        );
    }
    assert_eq!(completions.wait(&mut [], Duration::from_secs(3600)).expect("nothing to wait for"), 0);
    assert_eq!(device.poll_event(Duration::ZERO).expect("the event queue works"), None);
}

#[test]
fn a_wait_whose_completion_another_took_goes_on_to_its_end() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, destination) = connected(&device, PeerAccess::Write);
    let (from, to) = (Memory::new(PAGE_BYTES), Memory::new(PAGE_BYTES));
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, Access::RemoteWrite));
    let nap = Duration::from_millis(40);
    // Either thread may see the completion first, before or after its event. The case under test is the one
    // in which the sleeping thread loses after the event, hence the repetition.
    for _ in 0..100 {
        let completions = source.completions.clone();
        let waiting = thread::spawn(move || {
            let (mut into, began) = ([Completion::BLANK; 4], Instant::now());
            let count = completions.wait(&mut into, nap).expect("the queue works");
            (count, began.elapsed())
        });
        thread::sleep(nap / 4);
        let mut list = WriteList::with_capacity(1);
        list.push(page(0, &from_region, &to_region)).expect("the list has room");
        source.queue_pair.post_writes(&mut list).expect("the list is posted");
        let mut into = [Completion::BLANK; 4];
        while source.completions.poll(&mut into).expect("the queue works") == 0 && !waiting.is_finished() {}
        let (count, waited) = waiting.join().expect("the wait ends");
        assert!(count > 0 || waited >= nap, "it came back with nothing after {waited:?}");
    }
}

#[test]
fn a_closed_queue_pair_flushes_its_receives() {
    let Some(device) = device_or_skip() else { return };
    let (_source, mut destination) = connected(&device, PeerAccess::Write);
    destination.queue_pair.post_receive(1).expect("a receive is posted");
    destination.queue_pair.close().expect("the queue pair closes");
    let error = destination.take(1)[0].result.expect_err("nothing was received");
    assert_eq!(error.status, CompletionStatus::Flushed);
}

#[test]
fn memory_stays_mapped_until_the_last_queue_pair_that_used_it_is_gone() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, destination) = connected(&device, PeerAccess::Write);
    let (from, to) = (Memory::new(PAGE_BYTES), Memory::new(PAGE_BYTES));
    let (from_unmapped, to_unmapped) = (from.unmapped(), to.unmapped());
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, Access::RemoteWrite));
    let mut list = WriteList::with_capacity(1);
    list.push(page(0, &from_region, &to_region)).expect("the list has room");
    drop((from, from_region));
    assert!(!from_unmapped.load(Ordering::SeqCst), "the list holds it");
    source.queue_pair.post_writes(&mut list).expect("the list is posted");
    drop(list);
    source.succeed(1);
    assert!(!from_unmapped.load(Ordering::SeqCst), "the queue pair holds it");
    drop(source);
    assert!(from_unmapped.load(Ordering::SeqCst), "nobody holds it any more");

    drop((to, to_region));
    assert!(to_unmapped.load(Ordering::SeqCst), "a destination can revoke while its queue pair lives");
    drop(destination);
}

/// A destination can revoke access by destroying its queue pairs alone.
#[test]
fn the_key_of_a_region_opens_nothing_once_its_domain_has_no_queue_pair() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, mut destination) =
        (End::new(&device, PeerAccess::None), End::new(&device, PeerAccess::Write));
    let (one, other) = (source.queue_pair.local_endpoint(), destination.queue_pair.local_endpoint());
    destination.queue_pair.connect(&one, &ConnectOptions::default()).expect("the destination connects");
    // Soft-RoCE treats 7 retries as endless.
    let options = ConnectOptions { retry_count: 2, ..ConnectOptions::default() };
    source.queue_pair.connect(&other, &options).expect("the source connects");
    let to = Memory::new(PAGE_BYTES);
    let to_region = destination.register(&to, Access::RemoteWrite);
    let End { domain: _domain, queue_pair, .. } = destination;
    queue_pair.destroy().expect("the queue pair is destroyed");

    let (mut stranger, _others) = connected(&device, PeerAccess::Write);
    for (end, status) in
        [(&mut source, CompletionStatus::RetryExceeded), (&mut stranger, CompletionStatus::RemoteAccess)]
    {
        let from = Memory::new(PAGE_BYTES);
        from.write(0, &pattern(PAGE_BYTES));
        let from_region = end.register(&from, Access::LocalRead);
        let mut list = WriteList::with_capacity(1);
        list.push(page(0, &from_region, &to_region)).expect("the list has room");
        end.queue_pair.post_writes(&mut list).expect("the list is posted");
        let error = end.take(1)[0].result.expect_err("no queue pair takes the write");
        assert_eq!(error.status, status, "{error:?}");
    }
    assert_eq!(to.read(0, PAGE_BYTES), vec![0; PAGE_BYTES]);
    MemoryRegion::deregister(to_region).expect("the region was registered all the time");
}

#[test]
fn a_region_that_is_released_can_be_deregistered_while_the_queue_pair_goes_on() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, destination) = connected(&device, PeerAccess::Write);
    let to = destination.register(&Memory::new(PAGE_BYTES), Access::RemoteWrite);
    let mut list = WriteList::with_capacity(2);
    for round in 0..3 {
        let memory = Memory::new(PAGE_BYTES);
        let unmapped = memory.unmapped();
        let from = source.register(&memory, Access::LocalRead);
        drop(memory);
        list.push(Transfer { signalled: false, ..page(0, &from, &to) }).expect("the list has room");
        list.signal_last(round);
        source.queue_pair.post_writes(&mut list).expect("the list is posted");
        source.succeed(1);
        source.queue_pair.release(&from);
        MemoryRegion::deregister(from).expect("nobody else holds it");
        assert!(unmapped.load(Ordering::SeqCst), "round {round}");
    }
}

#[test]
fn requests_that_cannot_be_are_refused_before_the_device_sees_them() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, mut destination) = connected(&device, PeerAccess::Write);
    let memory = Memory::new(2 * PAGE_BYTES);
    let region = source.register(&memory, Access::LocalRead);
    let foreign = destination.register(&memory, Access::RemoteWrite);
    let mut list = WriteList::with_capacity(1);

    let outside = Transfer { offset_bytes: 1, len_bytes: 2 * PAGE_BYTES, ..page(0, &region, &foreign) };
    assert!(matches!(list.push(outside), Err(TransferError::OutOfRange { .. })));
    assert!(list.is_empty());
    list.push(page(0, &foreign, &foreign)).expect("the list has room");
    assert!(matches!(list.push(page(1, &foreign, &foreign)), Err(TransferError::Full { capacity: 1 })));
    assert!(matches!(source.queue_pair.post_writes(&mut list), Err(PostError::ForeignRegion)));
    assert_eq!(list.len(), 1);
    list.clear();

    let mut alone = End::new(&device, PeerAccess::None);
    assert!(matches!(alone.queue_pair.post_write_immediate(1, 1), Err(PostError::NotConnected)));
    let again = destination.queue_pair.local_endpoint();
    let result = source.queue_pair.connect(&again, &ConnectOptions::default());
    assert!(matches!(result, Err(Error::AlreadyConnected)));
    let mut forged = again;
    forged.queue_pair_number = 1 << 24;
    let result = alone.queue_pair.connect(&forged, &ConnectOptions::default());
    assert!(matches!(result, Err(Error::Endpoint(EndpointError::QueuePairNumber))));

    let limit = device.limits().completions;
    assert!(matches!(CompletionQueue::new(&device, limit.saturating_add(1)), Err(Error::OverLimit { .. })));
    let mapping: Arc<dyn Mapping> = Arc::<Memory>::clone(&memory);
    let beyond =
        MemoryRegion::register(&source.domain, mapping, PAGE_BYTES, 2 * PAGE_BYTES, Access::LocalRead);
    assert!(matches!(beyond, Err(Error::RegionOutOfRange { .. })));
    destination.queue_pair.close().expect("the queue pair closes");
}

#[test]
fn more_than_a_queue_pair_holds_is_refused_with_the_number_posted() {
    let Some(device) = device_or_skip() else { return };
    let (mut source, destination) = connected(&device, PeerAccess::Write);
    let (from, to) = (Memory::new(PAGE_BYTES), Memory::new(PAGE_BYTES));
    let (from_region, to_region) =
        (source.register(&from, Access::LocalRead), destination.register(&to, Access::RemoteWrite));
    let room = source.queue_pair.capacity().send_work_requests as usize;
    let mut list = WriteList::with_capacity(room + 100);
    while !list.is_full() {
        let write = Transfer { signalled: false, ..page(0, &from_region, &to_region) };
        list.push(write).expect("the list has room");
    }
    let error = source.queue_pair.post_writes(&mut list).expect_err("the list is longer than the queue");
    assert!((1..=room + 1).contains(&error.posted()), "{error} with room for {room}");
    assert!(list.is_empty());
}

#[test]
fn a_device_is_described_and_found_by_name() {
    let Some(device) = device_or_skip() else { return };
    let library = Library::load().expect("it was loaded before");
    let devices = library.devices().expect("there is one");
    assert!(devices.contains(device.info()));
    if device.name().starts_with("rxe") {
        assert!(device.info().soft_roce, "{:?}", device.info());
        let netdev = device.info().netdev.as_deref().expect("soft-RoCE is made on an interface");
        assert!(std::path::Path::new("/sys/class/net").join(netdev).exists(), "{netdev}");
    }
    let error = Device::open(&library, "no such device").expect_err("there is none of that name");
    assert!(error.to_string().contains(device.name()), "{error}");

    let (port, gid) = address(&device);
    assert!(port.gids.contains(&gid));
    assert_eq!(port.choose_gid(GidChoice::Index(gid.index)), Ok(gid));
    assert!(device.limits().queue_pairs > 0 && device.limits().memory_region_bytes > 0);
}

/// How many objects of a kind the kernel holds for a device, as `rdma resource show` counts them.
fn kernel_objects(device: &str) -> String {
    let output =
        Command::new("rdma").args(["resource", "show", device]).output().expect("iproute2's `rdma` runs");
    String::from_utf8(output.stdout).expect("plain text")
}

/// Runs alone in its process, because other tests create objects too: see `in_a_process_of_its_own`.
#[test]
#[ignore = "run by nothing_is_left_behind"]
fn make_and_drop_everything_many_times() {
    let Some(device) = device_or_skip() else { return };
    let memory = Memory::new(16 * PAGE_BYTES);
    let before = kernel_objects(device.name());
    for _ in 0..200 {
        let (source, destination) = connected(&device, PeerAccess::Write);
        let _regions =
            (source.register(&memory, Access::LocalRead), destination.register(&memory, Access::RemoteWrite));
        assert_ne!(kernel_objects(device.name()), before, "the kernel counts what is made");
    }
    assert_eq!(kernel_objects(device.name()), before);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
#[ignore = "run by a_limit_on_locked_memory_is_named"]
fn pin_more_than_is_allowed() {
    let Some(device) = device_or_skip() else { return };
    let domain = ProtectionDomain::new(&device).expect("a protection domain");
    let len_bytes = 64 << 20;
    let error = MemoryRegion::register(&domain, Memory::new(len_bytes), 0, len_bytes, Access::LocalRead)
        .expect_err("more than the limit");
    assert!(
        matches!(error, Error::Pin { memlock_limit_bytes: Some(8_388_608), .. }),
        "the limit is named: {error:?}"
    );
    assert!(error.to_string().contains("ulimit -l unlimited"), "{error}");
}

/// Runs an ignored test of this file alone, after the words of `prefix`.
fn in_a_process_of_its_own(prefix: &[&str], test: &str) {
    let program = std::env::current_exe().expect("this test has a path");
    let words = prefix.iter().map(std::ffi::OsStr::new).chain([program.as_os_str()]).collect::<Vec<_>>();
    let output = Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", test, "--ignored", "--nocapture"])
        .output()
        .expect("the command runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn nothing_is_left_behind() {
    let Some(_) = device_or_skip() else { return };
    in_a_process_of_its_own(&[], "make_and_drop_everything_many_times");
}

#[test]
fn a_limit_on_locked_memory_is_named() {
    let Some(_) = device_or_skip() else { return };
    let prefix =
        ["prlimit", "--memlock=8388608", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
    in_a_process_of_its_own(&prefix, "pin_more_than_is_allowed");
}

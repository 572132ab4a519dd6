//! A guest that uses little of its RAM takes no more memory for being moved, at either host.

mod common;

use std::thread;

use common::{TestGuest, TestHost, Watch, in_a_lab};
use sterna::destination::Receiver;
use sterna::source::{Options, migrate};
use sterna::transport::rdma::RdmaReach;
use sterna::transport::{TransportChoice, TransportKind};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 1024 * MIB;
const STRIDE_BYTES: u64 = 64 * MIB;

/// What a migration may add to the memory that a guest takes.
const MORE_BYTES: u64 = 8 * MIB;

#[test]
fn over_tcp_a_guest_with_a_page_in_each_64_mib_takes_the_memory_that_it_took_before() {
    moves_within_its_memory(TransportChoice::Tcp, "127.0.0.1:0");
}

#[test]
fn by_rdma_a_guest_with_a_page_in_each_64_mib_takes_the_memory_that_it_took_before() {
    let Some(address) = RdmaReach::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!("skipped: no RDMA device on this machine. With one: `ci/lab uml cargo test --test sparse`");
        return;
    };
    moves_within_its_memory(TransportChoice::Rdma, &format!("{address}:0"));
}

/// Pages once touched stay, so what is there after it was there at the most during it.
fn moves_within_its_memory(transport: TransportChoice, listen: &str) {
    let receiver = Receiver::bind(listen.parse().expect("an address")).expect("a free port");
    let to = receiver.local_address().expect("a bound socket has an address").to_string();
    let (host, guest) = (TestHost::default(), TestGuest::started_sparse(RAM_BYTES, STRIDE_BYTES));
    let before = guest.resident_bytes();
    assert!(before < 32 * MIB, "it is sparse: {before}");

    let options = Options { transport, ..Options::default() };
    let (arrival, report) = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&host).expect("the guest arrives"));
        let report = migrate(&guest, &to, &options, &Watch(|_: &_| {})).expect("the guest moves");
        (receiving.join().expect("the destination does not panic"), report)
    });
    let kind = if transport == TransportChoice::Rdma { TransportKind::Rdma } else { TransportKind::Tcp };
    assert_eq!(report.transport, kind);
    arrival.guest.runs_whole();
    for address in (STRIDE_BYTES / 2..RAM_BYTES).step_by(1 << 26) {
        let word: u64 = arrival.guest.machine.memory().read_obj(GuestAddress(address)).expect("it is in RAM");
        assert_eq!(word, address);
    }
    let after = [&guest, &arrival.guest].map(TestGuest::resident_bytes);
    println!("before {} KiB, after it {} and {} KiB", before >> 10, after[0] >> 10, after[1] >> 10);
    assert!(after.iter().all(|&after| after <= before + MORE_BYTES), "{before} before, {after:?} after");
}

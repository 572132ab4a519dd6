//! A queue pair of `sterna-rdma` writes into memory that a queue pair of the `ibverbs` crate registered.

#[expect(dead_code, reason = "shared with sterna-rdma's own tests, which use all of it")]
#[path = "../../tests/common/mod.rs"]
mod common;

use common::{End, Memory, address, device_or_skip};
use sterna_rdma::{
    Access, CompletionKind, ConnectOptions, Device, Endpoint, LinkLayer, PeerAccess, RemoteKey, Transfer,
    WriteList,
};

const PAGE_BYTES: usize = 4096;
const PAGES: usize = 64;

#[test]
fn our_writes_arrive_in_a_region_of_the_ibverbs_crate() {
    let Some(device) = device_or_skip() else { return };

    // The side of `ibverbs`.
    let context = open_theirs(&device);
    let their_completions = context.create_cq(16, 0).expect("they create a completion queue");
    let their_domain = context.alloc_pd().expect("they allocate a protection domain");
    let mut their_memory = their_domain.allocate::<u8>(PAGES * PAGE_BYTES).expect("they register memory");
    let remote_address = their_memory.as_mut_ptr().addr() as u64;
    let remote_key = RemoteKey::from_raw(their_memory.rkey().key);

    // The side of `sterna-rdma`.
    let mut ours = End::new(&device, PeerAccess::None);
    let memory = Memory::new(PAGES * PAGE_BYTES);
    let bytes: Vec<u8> = (0..PAGES * PAGE_BYTES).map(|index| (index / 251).to_le_bytes()[0] ^ 0x5a).collect();
    memory.write(0, &bytes);
    let region = ours.register(&memory, Access::LocalRead);

    // The `ibverbs` side sends nothing, so its first packet sequence number is the 0 that the crate sets, and
    // the other side's endpoint carries it.
    let our_endpoint = ours.queue_pair.local_endpoint();
    let mut builder =
        their_domain.create_qp(&their_completions, &their_completions, ibverbs::ibv_qp_type::IBV_QPT_RC);
    builder.allow_remote_rw().set_rq_psn(our_endpoint.packet_sequence_number);
    let on_ethernet = our_endpoint.link_layer == LinkLayer::Ethernet;
    if on_ethernet {
        builder.set_gid_index(address(&device).1.index);
    }
    let prepared = builder.build().expect("they create a queue pair");
    let theirs = prepared.endpoint();
    let their_endpoint = Endpoint {
        queue_pair_number: theirs.num,
        packet_sequence_number: 0,
        lid: theirs.lid,
        ..our_endpoint.clone()
    };
    let _their_queue_pair = prepared.handshake(as_theirs(&our_endpoint, theirs)).expect("they connect");
    ours.queue_pair.connect(&their_endpoint, &ConnectOptions::default()).expect("we connect");

    let mut list = WriteList::with_capacity(PAGES);
    for page in 0..PAGES {
        let offset_bytes = page * PAGE_BYTES;
        let write = Transfer {
            region: &region,
            offset_bytes,
            len_bytes: PAGE_BYTES,
            remote_address: remote_address + offset_bytes as u64,
            remote_key,
            id: page as u64,
            signalled: page + 1 == PAGES,
        };
        list.push(write).expect("the list has room");
    }
    ours.queue_pair.post_writes(&mut list).expect("we post the writes");
    assert_eq!(ours.succeed(1), [CompletionKind::Write]);
    assert!(their_memory[..] == bytes[..], "their memory holds what we wrote");
}

/// The same device, opened by `ibverbs`.
fn open_theirs(device: &Device) -> ibverbs::Context {
    let list = ibverbs::devices().expect("they list the devices");
    let same = list
        .iter()
        .find(|theirs| theirs.name().is_some_and(|name| name.to_bytes() == device.name().as_bytes()));
    same.expect("they see the device that we see").open().expect("they open it")
}

/// The endpoint in the notation of `ibverbs`: both ends are on one port, so the addresses are that crate's.
fn as_theirs(ours: &Endpoint, theirs: ibverbs::QueuePairEndpoint) -> ibverbs::QueuePairEndpoint {
    ibverbs::QueuePairEndpoint { num: ours.queue_pair_number, ..theirs }
}

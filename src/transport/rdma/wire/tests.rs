use proptest::prelude::*;
use sterna_rdma::{GidKind, LinkLayer};

use super::*;
use crate::wire::{LANE_BODY_MAX, TRANSPORT_BODY_MAX};

/// This many endpoints, each of the maximal length.
fn endpoints(count: usize) -> Vec<Endpoint> {
    let endpoint = Endpoint {
        queue_pair_number: u32::MAX,
        packet_sequence_number: u32::MAX,
        gid: [0xff; 16],
        gid_kind: GidKind::RoceV2,
        lid: u16::MAX,
        mtu_bytes: u16::MAX,
        link_layer: LinkLayer::Ethernet,
        reads_accepted: u8::MAX,
    };
    vec![endpoint; count]
}

fn chunks(count: usize) -> Vec<ChunkRange> {
    vec![ChunkRange { region: u16::MAX, first_page: u64::MAX, pages: u64::MAX }; count]
}

fn keys(count: usize) -> Keys {
    Keys(vec![ChunkKey { address: u64::MAX, key: RemoteKey::from_raw(u32::MAX) }; count])
}

#[test]
fn what_the_ends_say_comes_back_at_its_bound_and_fits_the_channel() {
    let offered = Offered { endpoints: endpoints(64), any_device: true };
    let body = offered.encode().unwrap();
    assert!(body.len() <= LANE_BODY_MAX, "{}", body.len());
    assert_eq!(Offered::decode(&body, 64).unwrap(), offered);
    let ready = Ready { endpoints: endpoints(64), pin_max_bytes: Some(u64::MAX) };
    let body = ready.encode().unwrap();
    assert!(body.len() <= LANE_BODY_MAX, "{}", body.len());
    assert_eq!(Ready::decode(&body).unwrap(), ready);
    for request in [Request::Register(chunks(CHUNKS_MAX)), Request::Release(chunks(CHUNKS_MAX))] {
        let body = request.encode().unwrap();
        assert!(body.len() <= TRANSPORT_BODY_MAX, "{}", body.len());
        assert_eq!(Request::decode(&body).unwrap(), request);
    }
    let body = keys(CHUNKS_MAX).encode().unwrap();
    assert!(body.len() <= TRANSPORT_BODY_MAX, "{}", body.len());
    assert_eq!(Keys::decode(&body).unwrap(), keys(CHUNKS_MAX));
}

#[test]
fn lists_that_are_too_long_are_refused_whoever_encoded_them() {
    let bytes = |value: &dyn Fn() -> postcard::Result<Vec<u8>>| value().unwrap();
    let (too_many, none) = (endpoints(65), endpoints(0));
    for endpoints in [too_many, none] {
        let offered = Offered { endpoints: endpoints.clone(), any_device: false };
        let ready = Ready { endpoints, pin_max_bytes: None };
        let lanes = u8::try_from(ready.endpoints.len()).unwrap();
        assert!(offered.encode().is_err() && ready.encode().is_err());
        assert!(Offered::decode(&bytes(&|| postcard::to_stdvec(&offered)), lanes).is_err());
        assert!(Ready::decode(&bytes(&|| postcard::to_stdvec(&ready))).is_err());
    }
    for request in [Request::Register(chunks(CHUNKS_MAX + 1)), Request::Release(chunks(CHUNKS_MAX + 1))] {
        assert!(request.encode().is_err());
        let refused = Request::decode(&bytes(&|| postcard::to_stdvec(&request)));
        assert!(matches!(refused, Err(TransportError::Wire(WireError::TooLong { .. }))), "{refused:?}");
    }
    let many = keys(CHUNKS_MAX + 1);
    assert!(many.encode().is_err());
    let refused = Keys::decode(&bytes(&|| postcard::to_stdvec(&many)));
    assert!(matches!(refused, Err(TransportError::Wire(WireError::TooLong { .. }))), "{refused:?}");
}

#[test]
fn an_offer_of_more_or_fewer_queue_pairs_than_lanes_is_malformed() {
    let body = Offered { endpoints: endpoints(4), any_device: false }.encode().unwrap();
    assert!(Offered::decode(&body, 4).is_ok());
    for lanes in [0, 3, 5, 64] {
        let refused = Offered::decode(&body, lanes);
        assert!(matches!(refused, Err(TransportError::Wire(WireError::Malformed(_)))), "{refused:?}");
    }
}

#[test]
fn a_body_that_is_cut_or_has_more_behind_it_is_malformed() {
    let of_each = [
        Offered { endpoints: endpoints(2), any_device: false }.encode().unwrap(),
        Ready { endpoints: endpoints(2), pin_max_bytes: None }.encode().unwrap(),
        Request::Register(chunks(2)).encode().unwrap(),
        keys(2).encode().unwrap(),
    ];
    let read = |which: usize, body: &[u8]| match which {
        0 => Offered::decode(body, 2).is_ok(),
        1 => Ready::decode(body).is_ok(),
        2 => Request::decode(body).is_ok(),
        _ => Keys::decode(body).is_ok(),
    };
    for (which, body) in of_each.iter().enumerate() {
        assert!(read(which, body), "{which}");
        assert!(!read(which, &body[..body.len() - 1]), "{which}, cut");
        assert!(!read(which, &[body.as_slice(), &[0]].concat()), "{which}, with more");
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_peer_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..300), lanes: u8) {
        let _ = (Offered::decode(&body, lanes), Ready::decode(&body));
        let _ = (Request::decode(&body), Keys::decode(&body));
    }
}

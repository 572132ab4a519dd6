//! What the destination's end of RDMA lanes says, for a test to change on its way.

use sterna::transport::rdma::wire::{ChunkKey, Keys, Ready};
use sterna::wire::Message;
use sterna_rdma::Endpoint;

/// Changes each of the queue pairs in a READY.
pub(crate) fn change_endpoints(message: &mut Message, change: impl FnMut(&mut Endpoint)) {
    let Message::Ready(lanes, ..) = message else { return };
    // That of another transport is left alone.
    let Ok(mut ready) = Ready::decode(&lanes.body) else { return };
    ready.endpoints.iter_mut().for_each(change);
    lanes.body = ready.encode().expect("it is as long as before");
}

/// Changes each of the keys in an answer to a request for registered memory.
pub(crate) fn change_keys(message: &mut Message, change: impl FnMut(&mut ChunkKey)) {
    let Message::Transport(body) = message else { return };
    let mut keys = Keys::decode(body).expect("a destination answers with nothing but keys");
    keys.0.iter_mut().for_each(change);
    *body = keys.encode().expect("it is as long as before");
}

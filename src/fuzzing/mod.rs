//! What another host or another user can send, as functions of bytes. None of them may panic, and what they
//! accept must hold.
//!
//! `fuzz/` calls them from libFuzzer, the test in this folder with damaged copies of good input. Not part of
//! the API.

mod control_channel;
mod image;
mod pages;
mod saved_state;
mod state_file;
#[cfg(test)]
mod tests;

use crate::lock::Lock;
use crate::transport::rdma::wire::{Keys, Offered, Ready, Request};
use crate::wire::{LockToken, Message, PREAMBLE_LEN, Preamble};

pub use control_channel::control_channel;
pub use image::image_offer;
pub use pages::page_frames;
pub use saved_state::{saved_state, sections};
pub use state_file::state_file;

/// A function of bytes from outside.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("message", message),
    ("preamble", preamble),
    ("control_channel", control_channel),
    ("rdma_bodies", rdma_bodies),
    ("page_frames", page_frames),
    ("saved_state", saved_state),
    ("sections", sections),
    ("image_offer", image_offer),
    ("state_file", state_file),
    ("lock_file", lock_file),
];

/// The body of a message; the first byte is its kind.
pub fn message(input: &[u8]) {
    let Some((&kind, body)) = input.split_first() else { return };
    let read = Message::decode(kind.into(), body);
    let owned = Message::decode_owned(kind.into(), body.to_vec());
    assert!(owned.is_ok() == read.is_ok(), "both ways of decoding agree");
    let (Ok(message), Ok(owned)) = (read, owned) else { return };
    assert!(message == owned, "both ways of decoding agree");
    assert_eq!(message.kind(), u16::from(kind));
    let again = message.encode().expect("a message that was accepted can be sent");
    assert!(again.len() <= Message::body_max(kind.into()).expect("its kind exists"));
    let again = Message::decode(kind.into(), &again).expect("a message that was sent is accepted");
    // A reason is cut where it is sent, and only there.
    assert!(again == message || matches!(message, Message::Abort(..) | Message::LanesFailed(..)));
}

/// What the two ends of RDMA say to each other; the first byte is the number of lanes.
pub fn rdma_bodies(input: &[u8]) {
    let Some((&lanes, body)) = input.split_first() else { return };
    if let Ok(offered) = Offered::decode(body, lanes) {
        assert!(offered.endpoints.len() == usize::from(lanes) && offered.encode().is_ok());
    }
    assert!(!Ready::decode(body).is_ok_and(|ready| ready.encode().is_err()));
    assert!(!Request::decode(body).is_ok_and(|request| request.encode().is_err()));
    assert!(!Keys::decode(body).is_ok_and(|keys| keys.encode().is_err()));
}

/// The first bytes of a connection.
pub fn preamble(input: &[u8]) {
    let mut bytes = [0; PREAMBLE_LEN];
    let len = input.len().min(PREAMBLE_LEN);
    bytes[..len].copy_from_slice(&input[..len]);
    if let Ok(preamble) = Preamble::decode(bytes) {
        assert_eq!(Preamble::decode(preamble.encode()), Ok(preamble));
    }
}

/// The file of a lock, which others may write to.
pub fn lock_file(input: &[u8]) {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let Ok(file) = rustix::fs::memfd_create("lock", flags) else { return };
    let mut file = std::fs::File::from(file);
    if file.write_all(input).is_ok() {
        let lock = Lock::at(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let _ = lock.arbitrates(LockToken([7; 16]));
        let _ = lock.take();
    }
}

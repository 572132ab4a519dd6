use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use zerocopy::IntoBytes;

use crate::control::{ControlChannel, Greeted};
use crate::wire::FrameHead;

/// How long a reader of bytes that are all there may take.
const READ_MAX: Duration = Duration::from_secs(20);

/// What arrives on a control channel after the greeting. The first byte says whether the rest is bytes, or
/// frames of a kind, a length in two bytes, and a body, which then get the digest that they need to be
/// believed.
pub fn control_channel(input: &[u8]) {
    let Some((&form, rest)) = input.split_first() else { return };
    let bytes = if form.is_multiple_of(2) { rest.to_vec() } else { sealed(rest) };
    let Some((peer, accepted)) = pair() else { return };
    let Ok(mut channel) = ControlChannel::over(Greeted::plain(accepted)) else { return };
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = (&peer).write_all(&bytes);
            let _ = peer.shutdown(Shutdown::Write);
        });
        while channel.receive("a message", Some(READ_MAX)).is_ok() {}
        // Where the reader gave up, the writer must not wait for it.
        let _ = peer.shutdown(Shutdown::Both);
    });
}

fn sealed(mut rest: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [kind, low, high, after @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (body, next) = after.split_at(len);
        if let Ok(head) = FrameHead::new((*kind).into(), body) {
            bytes.extend(head.as_bytes());
            bytes.extend(body);
        }
        rest = next;
    }
    bytes
}

fn pair() -> Option<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").ok()?;
    let peer = TcpStream::connect(listener.local_addr().ok()?).ok()?;
    Some((peer, listener.accept().ok()?.0))
}

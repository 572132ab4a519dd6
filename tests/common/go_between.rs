//! A go-between on the control channel: passes all messages on, and lets a test change the destination's.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use sterna::wire::{FRAME_HEAD_LEN, FrameHead, Message, PREAMBLE_LEN};
use zerocopy::{FromBytes, IntoBytes};

/// Listens at an address of this machine, and connects the first client to `destination`; each message of the
/// destination goes through `change`. Later clients, such as TCP lanes, are connected without change. Returns
/// the address.
pub(crate) fn go_between(
    ip: IpAddr,
    destination: SocketAddr,
    mut change: impl FnMut(&mut Message) + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).expect("a free port");
    let address = listener.local_addr().expect("a bound socket has an address");
    thread::spawn(move || {
        let (source, _) = listener.accept().expect("the source comes");
        let to = destination;
        let destination = TcpStream::connect(to).expect("the destination listens");
        let (mut from_source, mut to_destination) = (clone(&source), clone(&destination));
        thread::spawn(move || io::copy(&mut from_source, &mut to_destination));
        thread::spawn(move || {
            // Ends with the connection, whichever side closes first.
            let _ = pass_answers(&destination, &source, &mut change);
        });
        for lane in listener.incoming() {
            let lane = lane.expect("a lane comes");
            let Ok(lane_receiver) = TcpStream::connect(to) else { return };
            for (mut from, mut to) in [(clone(&lane), clone(&lane_receiver)), (lane_receiver, lane)] {
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
    address
}

fn pass_answers(
    mut from: &TcpStream,
    mut to: &TcpStream,
    change: &mut dyn FnMut(&mut Message),
) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE_LEN];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    loop {
        let mut head = [0; FRAME_HEAD_LEN];
        from.read_exact(&mut head)?;
        let head = FrameHead::read_from_bytes(&head).expect("a head of its length");
        let mut body = vec![0; head.body_len.get() as usize];
        from.read_exact(&mut body)?;
        head.check(&body).expect("what sterna says arrives");
        let mut message = Message::decode(head.kind.get(), &body).expect("what sterna says can be read");
        change(&mut message);
        let body = message.encode().expect("it is as long as before");
        to.write_all(FrameHead::new(message.kind(), &body).expect("a bounded length").as_bytes())?;
        to.write_all(&body)?;
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a descriptor is left")
}

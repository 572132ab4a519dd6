//! A host between source and destination, which may cut any connection of a migration, including lanes and
//! those over which a source in doubt asks.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use sterna::wire::{FRAME_HEAD_LEN, FrameHead, Message, PREAMBLE_LEN, Preamble, Role};
use zerocopy::{FromBytes, IntoBytes};

/// The sender of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Source,
    Destination,
}

/// The fate of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Pass,
    /// Another message arrives in its place.
    Forge(Box<Message>),
    /// It is lost, but later messages arrive.
    Lose,
    /// One of its bits flips in transit.
    Damage,
    /// It is lost, and its connection is cut.
    Cut,
}

type Decide = Arc<Mutex<dyn FnMut(usize, From, &Message) -> Fate + Send>>;

/// Passes everything on to `destination`; `decide` sees each message of each control connection, which are
/// counted from 0. Returns the relay's address.
pub(crate) fn relay(
    destination: SocketAddr,
    decide: impl FnMut(usize, From, &Message) -> Fate + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket has an address");
    let decide: Decide = Arc::new(Mutex::new(decide));
    thread::spawn(move || {
        let (mut controls, mut listener) = (0, listener);
        while let Ok((source, _)) = listener.accept() {
            // A destination that is down takes no connection, so the relay takes none either until the
            // destination is back.
            let Ok(there) = TcpStream::connect(destination) else {
                drop((source, listener));
                listener = again(destination, address);
                continue;
            };
            match pass_preamble(&source, &there) {
                Ok(Role::Control) => {
                    for (from, to, who) in
                        [(&source, &there, From::Source), (&there, &source, From::Destination)]
                    {
                        let (from, to, decide, number) = (clone(from), clone(to), decide.clone(), controls);
                        thread::spawn(move || {
                            let _ = pass_messages(&from, &to, who, &mut |message| {
                                decide.lock().unwrap_or_else(PoisonError::into_inner)(number, who, message)
                            });
                            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                        });
                    }
                    controls += 1;
                }
                Ok(Role::Lane) => {
                    for (mut from, mut to) in
                        [(clone(&source), clone(&there)), (clone(&there), clone(&source))]
                    {
                        thread::spawn(move || {
                            let _ = io::copy(&mut from, &mut to);
                            let _ = to.shutdown(Shutdown::Both);
                        });
                    }
                }
                Err(_) => {}
            }
        }
    });
    address
}

/// Listens at `address` again once the destination does.
fn again(destination: SocketAddr, address: SocketAddr) -> TcpListener {
    loop {
        thread::sleep(Duration::from_millis(20));
        if TcpStream::connect(destination).is_ok()
            && let Ok(listener) = TcpListener::bind(address)
        {
            return listener;
        }
    }
}

fn pass_preamble(mut source: &TcpStream, mut destination: &TcpStream) -> io::Result<Role> {
    let mut preamble = [0; PREAMBLE_LEN];
    source.read_exact(&mut preamble)?;
    destination.write_all(&preamble)?;
    Ok(Preamble::decode(preamble).expect("a source's preamble").role)
}

fn pass_messages(
    mut from: &TcpStream,
    mut to: &TcpStream,
    who: From,
    decide: &mut dyn FnMut(&Message) -> Fate,
) -> io::Result<()> {
    if who == From::Destination {
        let mut preamble = [0; PREAMBLE_LEN];
        from.read_exact(&mut preamble)?;
        to.write_all(&preamble)?;
    }
    loop {
        let mut bytes = [0; FRAME_HEAD_LEN];
        from.read_exact(&mut bytes)?;
        let head = FrameHead::read_from_bytes(&bytes).expect("a head of its length");
        let mut body = vec![0; head.body_len.get() as usize];
        from.read_exact(&mut body)?;
        head.check(&body).expect("what sterna says arrives");
        let message = Message::decode(head.kind.get(), &body).expect("what sterna says can be read");
        match decide(&message) {
            Fate::Pass => {}
            Fate::Forge(message) => {
                let body = message.encode().expect("a message within its bounds");
                let head = FrameHead::new(message.kind(), &body).expect("a body within its bounds");
                to.write_all(head.as_bytes())?;
                to.write_all(&body)?;
                continue;
            }
            Fate::Lose => continue,
            Fate::Damage => {
                let middle = body.len() / 2;
                body[middle] ^= 1;
            }
            Fate::Cut => return Ok(()),
        }
        to.write_all(head.as_bytes())?;
        to.write_all(&body)?;
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a descriptor is left")
}

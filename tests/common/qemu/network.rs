//! The network segment of the guests: a hub between the QEMUs and a TCP client of the test.
//!
//! QEMU sends each frame as a datagram to a unix socket. The client is a TCP stack in this process, so it
//! needs neither privileges nor a device of the kernel. It sees the frames of all QEMUs: a TCP session goes
//! on while the guest moves.

mod device;

use std::fmt::Debug;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};
use tempfile::TempDir;

use self::device::Frames;
use super::wait::wait_for;

/// The address that the Linux guest takes, and its port.
pub(super) const GUEST_ADDRESS: &str = "10.99.0.2";
const GUEST: (IpAddress, u16) = (IpAddress::v4(10, 99, 0, 2), 7777);
const CLIENT: IpAddress = IpAddress::v4(10, 99, 0, 1);
const BUFFER_BYTES: usize = 4096;
const FRAME_BYTES_MAX: usize = 65_536;

#[derive(Debug)]
pub(crate) struct Network {
    folder: TempDir,
    shared: Arc<Mutex<Shared>>,
    hub: Option<JoinHandle<()>>,
}

/// A TCP session with the guest's load.
#[derive(Debug)]
pub(crate) struct Session {
    shared: Arc<Mutex<Shared>>,
    index: usize,
}

#[derive(Debug, Default)]
struct Shared {
    ports: Vec<Port>,
    sessions: Vec<SessionState>,
    ended: bool,
}

/// Where a QEMU is plugged in.
#[derive(Debug)]
struct Port {
    socket: UnixDatagram,
    qemu: std::path::PathBuf,
}

#[derive(Debug, Default)]
struct SessionState {
    handle: Option<SocketHandle>,
    established: bool,
    closed: bool,
    to_send: Vec<u8>,
    received: Vec<u8>,
}

impl Network {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("sterna-net-").tempdir().expect("a temporary folder");
        let shared = Arc::<Mutex<Shared>>::default();
        let of_hub = shared.clone();
        let hub = thread::spawn(move || forward(&of_hub));
        Self { folder, shared, hub: Some(hub) }
    }

    /// Opens a session with the guest, which may still boot.
    pub(crate) fn connect(&self) -> Session {
        let index = {
            let mut shared = lock(&self.shared);
            shared.sessions.push(SessionState::default());
            shared.sessions.len() - 1
        };
        let session = Session { shared: self.shared.clone(), index };
        wait_for("the guest accepts a TCP session", || session.state(|state| state.established));
        session
    }

    /// QEMU's arguments for a machine of this name.
    pub(super) fn plug_in(&self, machine: &str) -> Vec<String> {
        let path = |end: &str| self.folder.path().join(format!("{machine}.{end}"));
        let socket = UnixDatagram::bind(path("hub")).expect("the temporary folder can be written");
        socket.set_nonblocking(true).expect("a flag of the socket");
        lock(&self.shared).ports.push(Port { socket, qemu: path("qemu") });
        let address = |end: &str, path: &Path| format!("{end}.type=unix,{end}.path={}", path.display());
        let [local, remote] = [("local", path("qemu")), ("remote", path("hub"))].map(|(e, p)| address(e, &p));
        let netdev = format!("dgram,id=net,{local},{remote}");
        let device = "virtio-net-pci,netdev=net,mac=52:54:00:99:00:02".to_owned();
        vec!["-netdev".into(), netdev, "-device".into(), device]
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        lock(&self.shared).ended = true;
        if let Some(hub) = self.hub.take() {
            let _ = hub.join();
        }
    }
}

impl Session {
    /// Sends a line and waits for the guest's answer: the number of the line in this session.
    #[track_caller]
    pub(crate) fn exchange(&self, line: &str) -> u64 {
        self.send(line);
        let answer = self.receive();
        let (number, rest) = answer.split_once(' ').unwrap_or_else(|| panic!("not an answer: {answer}"));
        assert_eq!(rest, line, "the answer to another line");
        number.parse().expect("the number of the line")
    }

    /// Sends a line, whatever the guest does.
    pub(crate) fn send(&self, line: &str) {
        self.state(|state| state.to_send.extend(format!("{line}\n").bytes()));
    }

    /// Waits for the next line.
    #[track_caller]
    pub(crate) fn receive(&self) -> String {
        let mut line = None;
        wait_for("the guest answers over TCP", || {
            line = self.state(|state| {
                assert!(!state.closed, "the TCP session ended");
                let end = state.received.iter().position(|&byte| byte == b'\n')?;
                let line: Vec<u8> = state.received.drain(..=end).collect();
                Some(String::from_utf8_lossy(&line[..end]).into_owned())
            });
            line.is_some()
        });
        line.expect("it was waited for")
    }

    /// Whether the session is still open.
    pub(crate) fn is_open(&self) -> bool {
        self.state(|state| state.established && !state.closed)
    }

    fn state<T>(&self, access: impl FnOnce(&mut SessionState) -> T) -> T {
        access(&mut lock(&self.shared).sessions[self.index])
    }
}

/// The hub's thread.
fn forward(shared: &Mutex<Shared>) {
    let mut frames = Frames::default();
    let hardware = EthernetAddress([0x52, 0x54, 0, 0x99, 0, 1]);
    let mut interface = Interface::new(Config::new(hardware.into()), &mut frames, Instant::now());
    interface.update_ip_addrs(|addresses| {
        addresses.push(IpCidr::new(CLIENT, 24)).expect("the first address");
    });
    let mut sockets = SocketSet::new(Vec::new());
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    loop {
        {
            let mut shared = lock(shared);
            if shared.ended {
                return;
            }
            while let Some((port, bytes)) = next_frame(&shared.ports, &mut buffer) {
                let frame = &buffer[..bytes];
                send(&shared.ports, Some(port), frame);
                frames.received.push_back(frame.to_vec());
            }
            for (index, session) in shared.sessions.iter_mut().enumerate() {
                serve(session, index, &mut interface, &mut sockets);
            }
            interface.poll(Instant::now(), &mut frames, &mut sockets);
            while let Some(frame) = frames.sent.pop_front() {
                send(&shared.ports, None, &frame);
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn next_frame(ports: &[Port], buffer: &mut [u8]) -> Option<(usize, usize)> {
    let mut frames = ports.iter().enumerate();
    frames.find_map(|(index, port)| Some((index, port.socket.recv(buffer).ok()?)))
}

/// Sends a frame to all ports but the one from which it came. A QEMU that takes no frames loses it, as on a
/// real network.
fn send(ports: &[Port], from: Option<usize>, frame: &[u8]) {
    for (_, port) in ports.iter().enumerate().filter(|(index, _)| Some(*index) != from) {
        let _ = port.socket.send_to(frame, &port.qemu);
    }
}

/// Moves bytes between the socket of a session and its buffers.
fn serve(state: &mut SessionState, index: usize, interface: &mut Interface, sockets: &mut SocketSet<'_>) {
    let handle = *state.handle.get_or_insert_with(|| {
        let buffer = || SocketBuffer::new(vec![0; BUFFER_BYTES]);
        sockets.add(Socket::new(buffer(), buffer()))
    });
    let socket = sockets.get_mut::<Socket<'_>>(handle);
    if !socket.is_open() {
        state.closed |= state.established;
        if !state.established {
            // The guest refuses until its load has started.
            let port = 50_000 + u16::try_from(index).expect("few sessions");
            let _ = socket.connect(interface.context(), GUEST, port);
        }
        return;
    }
    state.established |= socket.may_send();
    state.closed |= state.established && !socket.may_recv();
    if socket.can_send() {
        let sent = socket.send_slice(&state.to_send).unwrap_or(0);
        state.to_send.drain(..sent);
    }
    let mut received = [0; BUFFER_BYTES];
    while let Ok(count @ 1..) = socket.recv_slice(&mut received) {
        state.received.extend(&received[..count]);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Guest RAM to guest RAM through a TCP stream over loopback, beside a plain stream of as many bytes.
//!
//! The frames are those of a TCP lane, and so are the calls that move them: `writev(2)` out of guest RAM,
//! `readv(2)` into it.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use sterna::memory::{GuestRam, PAGE_BYTES, PAGE_LEN, PageRun, receive_into, send_from};
use sterna::wire::{FRAME_BYTES_MAX, PageFrame, RUNS_MAX, WireRun};
use sterna_bench::ram::{run, touched};
use sterna_bench::{Stage, criterion, measuring};
use zerocopy::IntoBytes;

fn main() {
    let mut criterion = criterion();
    // Larger than caches, in RAM of twice that.
    let bytes = if measuring() { 64 << 20 } else { 4 << 20 };
    let (source, destination) = (touched(2 * bytes, 1), touched(2 * bytes, 0));
    let pages = (bytes / PAGE_LEN) as u64;
    let whole_frames = frames((0..pages / FRAME_PAGES).map(|n| run(n * FRAME_PAGES, FRAME_PAGES)));
    let scattered = frames((0..pages).map(|n| run(2 * n, 1)));

    let mut plain = Plain::new(bytes);
    let name = format!("TCP over loopback, {} MiB", bytes >> 20);
    let mut stage = Stage::new(&mut criterion, name, bytes, "plain write and read", || plain.pass());
    let mut vectored = Vectored::new(source.clone(), &destination, whole_frames);
    stage.beside("runs of 4 MiB", || vectored.pass());
    let mut vectored = Vectored::new(source.clone(), &destination, scattered.clone());
    stage.beside("scattered pages", || vectored.pass());
    let mut copied = Copied::new(source, bytes, scattered);
    stage.beside("scattered pages, copied first", || copied.pass());
    drop(stage);
    criterion.final_summary();
}

const FRAME_PAGES: u64 = FRAME_BYTES_MAX / PAGE_BYTES;

/// A frame's head, and the runs that follow it.
#[derive(Clone, Debug)]
struct Frame {
    head: Vec<u8>,
    runs: Vec<PageRun>,
}

/// The runs, in frames as full as a lane makes them.
fn frames(runs: impl Iterator<Item = PageRun>) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut runs = runs.peekable();
    while runs.peek().is_some() {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(run) =
            runs.next_if(|run| taken.len() < RUNS_MAX && bytes + run.len_bytes() <= FRAME_BYTES_MAX)
        {
            bytes += run.len_bytes();
            taken.push(run);
        }
        let mut head = PageFrame::pages(taken.len()).as_bytes().to_vec();
        for &run in &taken {
            head.extend(WireRun::encode(run).expect("it fits a frame").as_bytes());
        }
        frames.push(Frame { head, runs: taken });
    }
    frames
}

/// Out of guest RAM and into guest RAM, as a lane does it.
struct Vectored {
    stream: Stream,
    ram: GuestRam,
    frames: Vec<Frame>,
}

impl Vectored {
    fn new(ram: GuestRam, destination: &GuestRam, frames: Vec<Frame>) -> Self {
        let (destination, expected) = (destination.clone(), frames.clone());
        let stream = Stream::new(move |socket| {
            let mut first = [0; PageFrame::LEN];
            socket.read_exact(&mut first)?;
            for (index, frame) in expected.iter().enumerate() {
                socket.read_exact(&mut vec![0; frame.head.len() - PageFrame::LEN])?;
                let next = if index + 1 < expected.len() { PageFrame::LEN } else { 0 };
                receive_into(socket.as_fd(), &slices(&destination, &frame.runs), &mut first[..next])?;
            }
            Ok(())
        });
        Self { stream, ram, frames }
    }

    fn pass(&mut self) -> u64 {
        self.stream.pass(|socket| {
            self.frames
                .iter()
                .try_for_each(|frame| send_from(socket.as_fd(), &frame.head, &slices(&self.ram, &frame.runs)))
        })
    }
}

fn slices<'ram>(ram: &'ram GuestRam, runs: &[PageRun]) -> Vec<sterna::memory::GuestSlice<'ram>> {
    runs.iter().map(|&run| ram.slice(run).expect("the run is in RAM")).collect()
}

/// The alternative to `writev(2)`: the sender first copies the pages into one buffer. The receiver leaves
/// them in one piece.
struct Copied {
    stream: Stream,
    ram: GuestRam,
    frames: Vec<Frame>,
    buffer: Vec<u8>,
}

impl Copied {
    fn new(ram: GuestRam, bytes: usize, frames: Vec<Frame>) -> Self {
        let heads: usize = frames.iter().map(|frame| frame.head.len()).sum();
        Self { stream: reading(bytes + heads), ram, frames, buffer: vec![0; RUNS_MAX * PAGE_LEN] }
    }

    fn pass(&mut self) -> u64 {
        self.stream.pass(|socket| {
            self.frames.iter().try_for_each(|frame| {
                let slices = slices(&self.ram, &frame.runs);
                for (slice, copy) in slices.iter().zip(self.buffer.chunks_exact_mut(PAGE_LEN)) {
                    slice.copy_to(copy);
                }
                socket.write_all(&frame.head)?;
                socket.write_all(&self.buffer[..slices.len() * PAGE_LEN])
            })
        })
    }
}

/// As many bytes as fast as `write(2)` and `read(2)` take them, in pieces as large as a frame.
struct Plain {
    stream: Stream,
    bytes: Vec<u8>,
}

impl Plain {
    fn new(bytes: usize) -> Self {
        Self { stream: reading(bytes), bytes: vec![1; bytes] }
    }

    fn pass(&mut self) -> u64 {
        self.stream.pass(|socket| self.bytes.chunks(PIECE).try_for_each(|piece| socket.write_all(piece)))
    }
}

/// The length of a frame.
const PIECE: usize = 4 << 20;

/// A stream with a far end that reads `bytes` bytes into a buffer as large.
fn reading(bytes: usize) -> Stream {
    let mut into = vec![1; bytes];
    Stream::new(move |socket| into.chunks_mut(PIECE).try_for_each(|piece| socket.read_exact(piece)))
}

/// A connection over loopback; its far end receives one pass after another and answers each with a byte.
struct Stream {
    near: Option<TcpStream>,
    far: Option<JoinHandle<()>>,
}

impl Stream {
    fn new(mut receive: impl FnMut(&mut TcpStream) -> io::Result<()> + Send + 'static) -> Self {
        let (near, mut far) = connected().expect("loopback has room for a connection");
        let far = thread::spawn(move || {
            // Ends when the near end is closed.
            while receive(&mut far).and_then(|()| far.write_all(&[1])).is_ok() {}
        });
        Self { near: Some(near), far: Some(far) }
    }

    /// Sends one pass, and waits until the far end has received it.
    fn pass(&mut self, send: impl FnOnce(&mut TcpStream) -> io::Result<()>) -> u64 {
        let near = self.near.as_mut().expect("it is closed on drop only");
        let mut answer = [0];
        send(near).and_then(|()| near.read_exact(&mut answer)).expect("the far end takes it all");
        answer[0].into()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        drop(self.near.take());
        if let Some(far) = self.far.take() {
            far.join().expect("the far end does not panic");
        }
    }
}

fn connected() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

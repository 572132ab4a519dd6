//! The limit: `ib_write_bw` of perftest, which writes from one buffer into another as fast as the device can.
//!
//! Where the processor's clock cannot be read, as in User-mode Linux, it prints no bandwidth, and most of a
//! short run is its preparation. So it runs twice, with few and with many writes, and the difference of the
//! times belongs to the difference of the writes.
//!
//! It writes the same few MiB again and again, which fit a processor's cache; the memory of guests does not.
//! So a second limit is its speed with buffers too large for a cache.

use std::process::Command;
use std::time::{Duration, Instant};

use sterna::transport::rdma::RdmaTuning;

use super::device::RdmaDevice;
use super::failure::Failure;
use super::process::{Running, free_port, quote};
use super::statistics::Spread;

/// How `ib_write_bw` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) write_bytes: u64,
    pub(crate) queue_pairs: u64,
    pub(crate) depth: u64,
    /// Writes posted with one doorbell, which request one completion.
    pub(crate) list: u64,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { write_bytes, queue_pairs, depth, list } = self;
        let size = if *write_bytes < 1 << 20 {
            format!("{}K", write_bytes >> 10)
        } else {
            format!("{}M", write_bytes >> 20)
        };
        write!(formatter, "-s {size} -q {queue_pairs} -t {depth} -l {list}")
    }
}

/// Long writes, which a list does not speed up.
const fn long(write_bytes: u64, queue_pairs: u64, depth: u64) -> Shape {
    Shape { write_bytes, queue_pairs, depth, list: 1 }
}

/// The candidates for the best shape.
const SHAPES: [Shape; 12] = [
    long(64 << 10, 1, 128),
    long(64 << 10, 2, 128),
    long(64 << 10, 4, 128),
    long(256 << 10, 2, 64),
    long(256 << 10, 4, 64),
    long(1 << 20, 1, 16),
    long(1 << 20, 2, 16),
    long(1 << 20, 4, 16),
    long(1 << 20, 2, 128),
    long(4 << 20, 2, 8),
    Shape { write_bytes: 64 << 10, queue_pairs: 2, depth: 128, list: 16 },
    Shape { write_bytes: 16 << 10, queue_pairs: 4, depth: 256, list: 32 },
];

/// Enough candidates for a first impression.
const SHAPES_QUICK: [Shape; 4] =
    [long(64 << 10, 2, 128), long(1 << 20, 1, 16), long(1 << 20, 2, 16), long(1 << 20, 4, 16)];

/// Buffers of 64 MiB at each end, through which all writes go in turn.
const SHAPES_UNCACHED: [Shape; 3] = [long(16 << 20, 4, 2), long(32 << 20, 2, 2), long(64 << 20, 1, 2)];

/// Single pages, in lists and with as many in flight as a lane has.
pub(crate) fn pages(queue_pairs: u64) -> Shape {
    let RdmaTuning { window_writes, list_writes, .. } = RdmaTuning::default();
    Shape { write_bytes: 4096, queue_pairs, depth: window_writes.into(), list: list_writes.into() }
}

/// The fastest shape on this device.
pub(crate) fn best(device: &RdmaDevice, quick: bool) -> Result<Shape, Failure> {
    fastest(device, if quick { &SHAPES_QUICK } else { &SHAPES }, 512 << 20)
}

/// The fastest shape with buffers that fit no cache.
pub(crate) fn best_uncached(device: &RdmaDevice) -> Result<Shape, Failure> {
    fastest(device, &SHAPES_UNCACHED, 1 << 30)
}

fn fastest(device: &RdmaDevice, shapes: &[Shape], bytes: u64) -> Result<Shape, Failure> {
    let mut best: Option<(f64, Shape)> = None;
    for &shape in shapes {
        let speed = once(device, shape, bytes)?;
        eprintln!("  ib_write_bw {shape}: {speed:.0} MB/s");
        if best.is_none_or(|(fastest, _)| speed > fastest) {
            best = Some((speed, shape));
        }
    }
    best.map(|(_, shape)| shape).ok_or_else(|| Failure::TooShort("ib_write_bw".into()))
}

/// The speed of a shape in MB/s: the median of three.
pub(crate) fn speed(device: &RdmaDevice, shape: Shape, bytes: u64) -> Result<f64, Failure> {
    let speeds = (0..3).map(|_| once(device, shape, bytes)).collect::<Result<Vec<_>, _>>()?;
    Spread::of(&speeds)
        .map(|spread| spread.median)
        .ok_or_else(|| Failure::TooShort(format!("ib_write_bw {shape}")))
}

/// The speed of a shape in MB/s, measured once.
pub(crate) fn once(device: &RdmaDevice, shape: Shape, bytes: u64) -> Result<f64, Failure> {
    // The same number on each queue pair, and whole lists.
    let writes = |bytes: u64| (bytes / shape.write_bytes / shape.queue_pairs).next_multiple_of(shape.list);
    // Both runs fault in the buffer and warm the writes in flight.
    let few = writes(bytes / 16).max(WRITES_MIN.next_multiple_of(shape.list));
    let more = writes(bytes);
    let difference = run(device, shape, few + more)?.saturating_sub(run(device, shape, few)?);
    if difference < Duration::from_millis(20) {
        return Err(Failure::TooShort(format!("ib_write_bw {shape}")));
    }
    let bytes = more * shape.queue_pairs * shape.write_bytes;
    Ok(bytes as f64 / 1e6 / difference.as_secs_f64())
}

/// The fewest writes that `ib_write_bw` accepts.
const WRITES_MIN: u64 = 5;

/// The time that `ib_write_bw` takes for `writes` writes on each queue pair.
fn run(device: &RdmaDevice, shape: Shape, writes: u64) -> Result<Duration, Failure> {
    let port = free_port(device.address)?;
    let command = || {
        let mut command = Command::new("ib_write_bw");
        command.args(["-F", "-d", &device.name, "-i", &device.port.to_string()]);
        command.args(["-x", &device.gid_index.to_string(), "-p", &port.to_string()]);
        command.args(["-s", &shape.write_bytes.to_string(), "-q", &shape.queue_pairs.to_string()]);
        command.args(["-t", &shape.depth.to_string(), "-n", &writes.to_string()]);
        if shape.list > 1 {
            command.args(["-l", &shape.list.to_string(), "-Q", &shape.list.to_string()]);
        }
        command
    };
    let mut server = Running::start(&mut command(), "ib_write_bw", "perftest")?;
    server.until_listening(port)?;
    let began = Instant::now();
    let mut client = Running::start(command().arg(device.address.to_string()), "ib_write_bw", "perftest")?;
    let status = client.end(RUN_MAX)?;
    let took = began.elapsed();
    if !status.success() {
        return Err(client.ended(status));
    }
    let said = client.said();
    server.succeed(RUN_MAX)?;
    // It exits with success even after some errors. The printed number counts all queue pairs.
    if said.contains(&(writes * shape.queue_pairs).to_string()) && !said.contains("Completion with error") {
        Ok(took)
    } else {
        Err(Failure::Words { what: "ib_write_bw".into(), said: quote(&said) })
    }
}

const RUN_MAX: Duration = Duration::from_secs(120);

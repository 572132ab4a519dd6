//! One-sided writes of pages, guest RAM to guest RAM, beside long writes of as many bytes.
//!
//! Both ends are in this process, on one device: with soft-RoCE the same processors do the device's work at
//! either end.

use std::sync::Arc;
use std::time::Duration;

use sterna::memory::{GuestRam, PAGE_LEN};
use sterna_bench::ram::touched;
use sterna_bench::{Stage, criterion, measuring};
use sterna_rdma::{
    Access, Capacity, Completion, CompletionQueue, ConnectOptions, Device, Error, GidChoice, Library,
    Mapping, MemoryRegion, PeerAccess, Port, ProtectionDomain, QueuePair, Transfer, WriteList,
};

fn main() {
    let mut criterion = criterion();
    let device = match first_active() {
        Ok(device) => device,
        Err(cause) if std::env::var_os("STERNA_LAB").is_some_and(|value| value == "1") => {
            panic!("a lab has an RDMA device: {cause}")
        }
        Err(cause) => {
            println!(
                "skipped, all of it: {cause}\nWith a device: `ci/lab uml cargo bench -p sterna-bench --bench rdma`, or \
                 make one with `sterna soft-roce up`"
            );
            return;
        }
    };
    let bytes = if measuring() { 32 << 20 } else { 2 << 20 };
    let mut ends = Ends::connect(&device, bytes).expect("a queue pair can be connected to its own port");

    let name = format!("RDMA on {}, {} MiB", device.name(), bytes >> 20);
    let mut stage = Stage::new(&mut criterion, name, bytes, "writes of 1 MiB", || {
        ends.write(Shape { write_bytes: 1 << 20, apart: false, writes_per_list: 4, writes_per_signal: 4 })
    });
    let page = Shape { write_bytes: PAGE_LEN, apart: true, writes_per_list: 128, writes_per_signal: 256 };
    stage.beside("scattered pages, lists of 128, a signal every 256", || ends.write(page));
    for (name, writes_per_list, writes_per_signal) in [
        ("the same, lists of 64, a signal every 128", 64, 128),
        ("the same, lists of 32, a signal every 128", 32, 128),
        ("the same, lists of 32, a signal each", 32, 32),
        ("the same, lists of 1, a signal each", 1, 1),
    ] {
        stage.beside(name, || ends.write(Shape { writes_per_list, writes_per_signal, ..page }));
    }
    drop(stage);
    criterion.final_summary();
}

fn first_active() -> Result<Arc<Device>, Error> {
    let library = Library::load()?;
    for info in library.devices()? {
        let device = Device::open(&library, &info.name)?;
        if device.ports()?.iter().any(Port::is_active) {
            return Ok(device);
        }
    }
    Err(Error::NoDevice)
}

/// The division of a pass into writes.
#[derive(Clone, Copy, Debug)]
struct Shape {
    write_bytes: usize,
    /// Whether each write is followed by a gap of its own length.
    apart: bool,
    /// One doorbell per list.
    writes_per_list: usize,
    /// A multiple of `writes_per_list`.
    writes_per_signal: usize,
}

/// The bytes that a lane keeps in flight.
const WINDOW_BYTES: usize = 16 << 20;

/// A source and a destination, connected to each other.
struct Ends {
    // Queue pairs drop before the regions that they use.
    source: QueuePair,
    _destination: QueuePair,
    completions: Arc<CompletionQueue>,
    from: Arc<MemoryRegion>,
    to: Arc<MemoryRegion>,
    bytes: usize,
}

impl Ends {
    /// Ends that move `bytes` bytes a pass, in RAM of twice that.
    fn connect(device: &Arc<Device>, bytes: usize) -> Result<Self, Box<dyn std::error::Error>> {
        let port = device.ports()?.into_iter().find(Port::is_active).ok_or("the port went down")?;
        let gid = port.choose_gid(GidChoice::Auto)?;
        let completions = CompletionQueue::new(device, 2048)?;
        let end = |peer_access, access, word| -> Result<_, Box<dyn std::error::Error>> {
            let domain = ProtectionDomain::new(device)?;
            let capacity = Capacity { peer_access, ..Capacity::default() };
            let queue_pair = QueuePair::new(&domain, &port, &gid, &completions, &completions, capacity)?;
            let ram = mapping(&touched(2 * bytes, word));
            Ok((queue_pair, MemoryRegion::register(&domain, ram, 0, 2 * bytes, access)?))
        };
        let (mut source, from) = end(PeerAccess::None, Access::LocalRead, 1)?;
        let (mut destination, to) = end(PeerAccess::Write, Access::RemoteWrite, 0)?;
        destination.connect(&source.local_endpoint(), &ConnectOptions::default())?;
        source.connect(&destination.local_endpoint(), &ConnectOptions::default())?;
        Ok(Self { source, _destination: destination, completions, from, to, bytes })
    }

    /// One pass, posted as a lane does it: returns once all writes are acknowledged.
    fn write(&mut self, shape: Shape) -> u64 {
        let writes = self.bytes / shape.write_bytes;
        let signal_bytes = shape.write_bytes * shape.writes_per_signal;
        // A queue pair of the default capacity takes 1,024 requests.
        let signals_max = (WINDOW_BYTES / signal_bytes).min(1024 / shape.writes_per_signal).max(1);
        let stride = if shape.apart { 2 * shape.write_bytes } else { shape.write_bytes };
        let mut list = WriteList::with_capacity(shape.writes_per_list);
        let mut signals_in_flight = 0;
        for index in 0..writes {
            let last = index + 1 == writes;
            let signalled = last || (index + 1).is_multiple_of(shape.writes_per_signal);
            list.push(Transfer {
                region: &self.from,
                offset_bytes: index * stride,
                len_bytes: shape.write_bytes,
                remote_address: self.to.address() + (index * stride) as u64,
                remote_key: self.to.remote_key(),
                id: 0,
                signalled,
            })
            .expect("the list has room and the write is in the region");
            if list.is_full() || last {
                while signals_in_flight >= signals_max {
                    signals_in_flight -= self.reap();
                }
                self.source.post_writes(&mut list).expect("the window is within the capacity");
                signals_in_flight += usize::from(signalled);
            }
        }
        while signals_in_flight > 0 {
            signals_in_flight -= self.reap();
        }
        writes as u64
    }

    /// Waits for completions; returns their number.
    fn reap(&self) -> usize {
        let mut done = [Completion::BLANK; 16];
        let count = self.completions.wait(&mut done, Duration::from_secs(30)).expect("the queue works");
        assert!(count > 0, "no completion in 30 s");
        for completion in &done[..count] {
            completion.result.expect("the write arrives");
        }
        count
    }
}

fn mapping(ram: &GuestRam) -> Arc<dyn Mapping> {
    Arc::new(ram.regions()[0].clone())
}

//! Shared by the tests on a device: the device or a skip, memory to register, and two connected queue pairs.

#![expect(unsafe_code, reason = "memory that a device writes is mapped and read through raw pointers")]

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sterna_rdma::{
    Access, Capacity, Completion, CompletionKind, CompletionQueue, ConnectOptions, Device, Error, Gid,
    GidChoice, Library, Mapping, MemoryRegion, PeerAccess, Port, ProtectionDomain, QueuePair,
};

/// The first device with an active port. Without one the test is skipped; in a lab it fails.
pub(crate) fn device_or_skip() -> Option<Arc<Device>> {
    match first_active() {
        Ok(device) => Some(device),
        Err(cause) if std::env::var_os("STERNA_LAB").is_some_and(|value| value == "1") => {
            panic!("a lab has an RDMA device: {cause}")
        }
        Err(cause) => {
            let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
            println!(
                "skipped: {cause}. With a device: `ci/lab uml cargo test --manifest-path {manifest}`, or make one \
                 with `sterna soft-roce up`"
            );
            None
        }
    }
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

/// The active port of a device and its best GID.
pub(crate) fn address(device: &Device) -> (Port, Gid) {
    let ports = device.ports().expect("the ports can be queried");
    let port = ports.into_iter().find(Port::is_active).expect("the device was chosen for its active port");
    let gid = port.choose_gid(GidChoice::Auto).expect("an active port has an address");
    (port, gid)
}

/// Anonymous memory. `unmapped` is set when the memory is unmapped.
pub(crate) struct Memory {
    start: *mut u8,
    len_bytes: usize,
    unmapped: Arc<AtomicBool>,
}

// SAFETY: all threads access the memory through raw pointers and copies only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

// SAFETY: mapped readable and writable in `new`, unmapped on drop, never borrowed.
unsafe impl Mapping for Memory {
    fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

impl Memory {
    pub(crate) fn new(len_bytes: usize) -> Arc<Memory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no existing one.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len_bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Arc::new(Memory { start: start.cast(), len_bytes, unmapped: Arc::new(AtomicBool::new(false)) })
    }

    /// Set once the memory is unmapped.
    pub(crate) fn unmapped(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.unmapped)
    }

    pub(crate) fn write(&self, offset_bytes: usize, bytes: &[u8]) {
        assert!(offset_bytes + bytes.len() <= self.len_bytes);
        let start = self.start.wrapping_add(offset_bytes);
        // SAFETY: the range was just checked, and no reference to the memory exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
    }

    pub(crate) fn read(&self, offset_bytes: usize, len_bytes: usize) -> Vec<u8> {
        assert!(offset_bytes + len_bytes <= self.len_bytes);
        let mut bytes = vec![0; len_bytes];
        let start = self.start.wrapping_add(offset_bytes);
        // SAFETY: the range was just checked, and no reference to the memory exists.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), len_bytes) };
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped in this place only; a region registered from it held an Arc until
        // now.
        unsafe { libc::munmap(self.start.cast(), self.len_bytes) };
        self.unmapped.store(true, Ordering::SeqCst);
    }
}

/// One end of a connection within this process.
pub(crate) struct End {
    pub(crate) domain: Arc<ProtectionDomain>,
    pub(crate) completions: Arc<CompletionQueue>,
    pub(crate) queue_pair: QueuePair,
}

impl End {
    pub(crate) fn new(device: &Arc<Device>, peer_access: PeerAccess) -> End {
        let (port, gid) = address(device);
        let domain = ProtectionDomain::new(device).expect("a protection domain");
        let completions = CompletionQueue::new(device, 2048).expect("a completion queue");
        let capacity = Capacity { send_work_requests: 1100, receive_work_requests: 16, peer_access };
        let queue_pair = QueuePair::new(&domain, &port, &gid, &completions, &completions, capacity);
        End { domain, completions, queue_pair: queue_pair.expect("a queue pair") }
    }

    pub(crate) fn register(&self, memory: &Arc<Memory>, access: Access) -> Arc<MemoryRegion> {
        let len_bytes = memory.len_bytes();
        let mapping: Arc<dyn Mapping> = Arc::<Memory>::clone(memory);
        MemoryRegion::register(&self.domain, mapping, 0, len_bytes, access).expect("memory is registered")
    }

    /// The next `count` completions; panics when they do not come.
    pub(crate) fn take(&self, count: usize) -> Vec<Completion> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut taken = Vec::new();
        let mut batch = [Completion::BLANK; 32];
        while taken.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} completions in a minute: {taken:?}", taken.len());
            let got = self.completions.wait(&mut batch, left).expect("the completion queue works");
            taken.extend_from_slice(&batch[..got]);
        }
        taken
    }

    /// The next `count` completions, all successful.
    pub(crate) fn succeed(&self, count: usize) -> Vec<CompletionKind> {
        let kinds = self.take(count).into_iter().map(|completion| completion.result);
        kinds.collect::<Result<_, _>>().expect("every request succeeds")
    }
}

/// A source and a destination, connected to each other.
pub(crate) fn connected(device: &Arc<Device>, destination_access: PeerAccess) -> (End, End) {
    let mut source = End::new(device, PeerAccess::None);
    let mut destination = End::new(device, destination_access);
    let (one, other) = (source.queue_pair.local_endpoint(), destination.queue_pair.local_endpoint());
    destination.queue_pair.connect(&one, &ConnectOptions::default()).expect("the destination connects");
    source.queue_pair.connect(&other, &ConnectOptions::default()).expect("the source connects");
    (source, destination)
}

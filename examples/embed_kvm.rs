//! A VMM of one file that moves its guest: `cargo run --example embed_kvm`, with access to /dev/kvm.
//!
//! The guest is nine bytes of code that count in memory. It moves over loopback TCP to another machine in
//! this process.
#![expect(unsafe_code, reason = "a VMM answers for its memory slots")]

use std::error::Error;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use sterna::destination::{self, Receiver};
use sterna::dirty::{DirtyLog, EitherLog, KvmLog, KvmSlot, SoftwareBitmap, SoftwareLog};
use sterna::guest::Refusal;
use sterna::guest::*;
use sterna::memory::GuestRam;
use sterna::saved_state::{StateReader, StateWriter};
use sterna::source::{Options, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const RAM_BYTES: u64 = 4 << 20;
const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x2000;
/// `again: inc dword [0x2000]; out 0x10, al; jmp again`. Each round leaves the guest, so nothing need
/// interrupt it.
const PROGRAM: [u8; 9] = [0x66, 0xff, 0x06, 0x00, 0x20, 0xe6, 0x10, 0xeb, 0xf7];

struct Machine {
    vm: VmFd,
    vcpu: Arc<Vcpu>,
    /// Runs the vCPU, and ends before the memory is unmapped.
    thread: Option<JoinHandle<()>>,
    slot: KvmSlot,
    /// The bitmap marks what this VMM itself writes, which KVM never sees.
    memory: GuestMemoryMmap<SoftwareBitmap>,
}

struct Vcpu {
    fd: Mutex<VcpuFd>,
    stopped: AtomicBool,
    over: AtomicBool,
}

impl Vcpu {
    fn run(&self) {
        while !self.over.load(Ordering::SeqCst) {
            let mut fd = self.fd.lock().unwrap();
            // Read under the lock: after `stopped` was set, one turn with the lock means that the vCPU
            // stands still.
            if self.stopped.load(Ordering::SeqCst) {
                drop(fd);
                thread::sleep(Duration::from_millis(1));
            } else {
                fd.run().expect("KVM runs the program");
            }
        }
    }
}

impl Machine {
    /// A machine that has never run, with none of its RAM touched.
    fn new() -> Result<Self, Box<dyn Error>> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES.try_into()?)])?;
        let host_address = memory.get_host_address(GuestAddress(0))? as u64;
        let slot = KvmSlot { slot: 0, guest_address: 0, len_bytes: RAM_BYTES, host_address };
        let (memory_size, userspace_addr) = (RAM_BYTES, host_address);
        let vm = Kvm::new()?.create_vm()?;
        let region = kvm_userspace_memory_region { memory_size, userspace_addr, ..Default::default() };
        // SAFETY: the memory stays mapped until the one vCPU's thread has ended, and no other slot has it.
        unsafe { vm.set_user_memory_region(region) }?;
        vm.set_tss_address(0xfffb_d000)?;
        let fd = Mutex::new(vm.create_vcpu(0)?);
        let vcpu = Arc::new(Vcpu { fd, stopped: AtomicBool::new(true), over: AtomicBool::new(false) });
        let runs = vcpu.clone();
        Ok(Self { vm, vcpu, thread: Some(thread::spawn(move || runs.run())), slot, memory })
    }

    fn load_program(&self) -> Result<(), Box<dyn Error>> {
        self.memory.write_slice(&PROGRAM, GuestAddress(CODE))?;
        let vcpu = self.vcpu.fd.lock().unwrap();
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        Ok(vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..kvm_regs::default() })?)
    }

    fn counter(&self) -> Result<u32, Box<dyn Error>> {
        Ok(self.memory.read_obj(GuestAddress(COUNTER))?)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpu.over.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Guest for Machine {
    fn name(&self) -> &str {
        "counter"
    }
    fn ram(&self) -> Result<GuestRam, GuestError> {
        Ok(GuestRam::from_vm_memory(&self.memory)?)
    }
    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for Machine {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        Ok(b"one real-mode vCPU".into())
    }
    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        // SAFETY: the descriptor is that of `self.vm`, which outlives the borrow.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: it is the one slot of this VM, set without flags, and stays.
        let kvm = unsafe { KvmLog::new(vm, vec![self.slot], &self.ram()?) }?;
        Ok(Box::new(EitherLog(kvm, SoftwareLog::new(&self.memory))))
    }
    fn throttle(&self, _percent: u8) -> Result<(), GuestError> {
        Err(GuestError::new("this VMM cannot slow its guest"))
    }
    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.vcpu.stopped.store(true, Ordering::SeqCst);
        drop(self.vcpu.fd.lock().unwrap());
        Ok(())
    }
    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        let mut vcpu = self.vcpu.fd.lock().unwrap();
        // Completes the `out` that the guest was left by. It is no error that this runs nothing.
        vcpu.set_kvm_immediate_exit(1);
        let _ = vcpu.run();
        vcpu.set_kvm_immediate_exit(0);
        let regs = vcpu.get_regs().map_err(GuestError::new)?;
        let sregs = vcpu.get_sregs().map_err(GuestError::new)?;
        serde_json::to_writer(state.section("vcpu")?, &(regs, sregs)).map_err(GuestError::new)
    }
    fn resume(&self) -> Result<RunOutcome, GuestError> {
        self.vcpu.stopped.store(false, Ordering::SeqCst);
        Ok(RunOutcome::Running)
    }
}

impl DestinationGuest for Machine {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }
    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        let (regs, sregs): (kvm_regs, kvm_sregs) =
            serde_json::from_reader(state.section("vcpu")?).map_err(GuestError::new)?;
        let vcpu = self.vcpu.fd.lock().unwrap();
        vcpu.set_sregs(&sregs).and_then(|()| vcpu.set_regs(&regs)).map_err(GuestError::new)
    }
    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.resume()
    }
    fn discard(self) -> Result<(), GuestError> {
        Ok(())
    }
}

struct Host;

impl GuestHost for Host {
    type Guest = Machine;

    fn prepare(&self, _proposal: &Proposal<'_>) -> Result<Machine, Refusal> {
        // The engine compares the RAM. A real VMM reads `proposal.details`.
        Machine::new().map_err(|error| Refusal::Incompatible(error.to_string()))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Err(error) = Kvm::new() {
        println!("skipped: /dev/kvm: {error}; it takes kvm_intel or kvm_amd, and root or group kvm");
        return Ok(());
    }
    // A VMM has a folder on each host instead (`HostState::in_folder`): after a crash it says who owns the
    // guest.
    let [source, destination] = [(); 2].map(|()| HostState::lost_with_this_process());
    let receiver = Receiver::bind("127.0.0.1:0".parse()?, destination)?;
    let to = receiver.local_address()?.to_string();
    let arriving = thread::spawn(move || receiver.receive(&Host, &destination::Options::default(), &()));

    let guest = Machine::new()?;
    let claim = source.start(guest.name(), false)?;
    guest.load_program().and_then(|()| Ok(guest.resume()?))?;
    thread::sleep(Duration::from_millis(100));
    let options = Options { transports: TcpProvider.into(), ..Options::default() };
    let report = migrate(&guest, &claim, &to, &options, &())?;
    let arrival = arriving.join().expect("the destination does not panic")?;
    let (left_with, arrived_with) = (guest.counter()?, arrival.guest.counter()?);
    while arrival.guest.counter()? < arrived_with.wrapping_add(1000) {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(left_with > 0 && arrived_with >= left_with && guest.counter()? == left_with);
    println!("moved at {left_with} in {:.1} ms of downtime, and counts on", report.downtime_ms);
    Ok(())
}

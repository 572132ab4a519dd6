//! The thread of a vCPU: entering and leaving the guest.
#![expect(unsafe_code, reason = "the signal handler writes a field of the vCPU's kvm_run")]

use std::cell::Cell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{Ordering, compiler_fence};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::clock::monotonic_ns;
use crate::error::MachineError;
use crate::guest::payload::PORT_BEAT;
use crate::kvm::ports::{Console, PORTS_SERIAL};
use crate::kvm::ring::DirtyRings;
use crate::platform::Platform;
use crate::poison::IgnorePoison;
use crate::vcpu_threads::{Then, VcpuThreads};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null in a thread without one.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that brings a vCPU thread out of the guest, with its handler installed.
///
/// A signal between the thread's last look at its orders and its entry into the guest would go unnoticed. So
/// the handler sets `immediate_exit`, and the entry returns at once (Documentation/virt/kvm/api.rst,
/// KVM_RUN).
pub(crate) fn kick_signal() -> Result<c_int, MachineError> {
    let signal = SIGRTMIN();
    register_signal_handler(signal, on_kick).map_err(|error| MachineError::Kvm {
        doing: "be left by a signal".to_owned(),
        source: error.into(),
    })?;
    Ok(signal)
}

extern "C" fn on_kick(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the pointer is into the mapping that this thread's vCPU keeps as long as `run` lasts, and
        // it is null before and after. The handler runs on the same thread, so no other code is writing to
        // it.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Runs a vCPU until an order ends its thread. An error describes the guest's end.
pub(crate) fn run(
    fd: &Mutex<VcpuFd>,
    mut thread: VcpuThread<'_>,
    vcpu_threads: &VcpuThreads,
) -> Result<(), String> {
    let mut guard = fd.lock().ignore_poison();
    let _kicks = Kicks::begin(&mut guard);
    loop {
        guard.set_kvm_immediate_exit(0);
        // A kick after this line is seen by `wanted` or by KVM_RUN.
        compiler_fence(Ordering::SeqCst);
        if vcpu_threads.wanted() {
            thread.finish_io(&mut guard)?;
            drop(guard);
            if vcpu_threads.wait() == Then::Leave {
                return Ok(());
            }
            guard = fd.lock().ignore_poison();
            continue;
        }
        if thread.is_over_quota() {
            thread.rest(vcpu_threads);
            continue;
        }
        thread.enter(&mut guard)?;
    }
}

/// While this value lives, the kick signal reaches the vCPU of this thread.
struct Kicks;

impl Kicks {
    fn begin(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Kicks {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Why KVM returned.
enum Back {
    /// The exit is served, and the guest may continue.
    Served,
    Interrupted,
}

pub(crate) struct VcpuThread<'a> {
    vcpu: u8,
    platform: &'a Platform,
    console: &'a Console,
    rings: Option<&'a DirtyRings>,
    /// How often in a row KVM reported a full ring that was empty.
    full_in_vain: u32,
}

/// Another thread may have made room meanwhile, so a single report means nothing.
const FULL_IN_VAIN_MAX: u32 = 1000;

impl<'a> VcpuThread<'a> {
    pub(crate) fn new(
        vcpu: u8,
        platform: &'a Platform,
        console: &'a Console,
        rings: Option<&'a DirtyRings>,
    ) -> Self {
        Self { vcpu, platform, console, rings, full_in_vain: 0 }
    }

    /// Lets KVM finish the port access of its last exit: the guest's registers are complete only then.
    fn finish_io(&mut self, fd: &mut VcpuFd) -> Result<(), String> {
        loop {
            fd.set_kvm_immediate_exit(1);
            if let Back::Interrupted = self.enter(fd)? {
                return Ok(());
            }
        }
    }

    fn enter(&mut self, fd: &mut VcpuFd) -> Result<Back, String> {
        let unexpected = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => return self.port_out(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.port_in(port, data);
                return Ok(Back::Served);
            }
            Ok(VcpuExit::Intr) => return Ok(Back::Interrupted),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Back::Interrupted);
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match self.make_room() {
                Ok(()) => return Ok(Back::Served),
                Err(what) => what,
            },
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
            Ok(VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _)) => {
                format!("access to guest address {address:#x}, where there is nothing")
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                format!("the processor refused to enter the guest ({reason:#x})")
            }
            Ok(exit) => format!("unexpected exit from the guest: {exit:?}"),
            Err(error) => format!("KVM_RUN: {error}"),
        };
        let rip = fd.get_regs().map_or_else(|_| "?".to_owned(), |regs| format!("{:#x}", regs.rip));
        Err(format!("vCPU {} at {rip}: {unexpected}", self.vcpu))
    }

    fn is_over_quota(&self) -> bool {
        self.rings.is_some_and(|rings| rings.quota().due_ns(self.vcpu.into()) > monotonic_ns())
    }

    /// Stands still until the vCPU may write again, or its thread is wanted.
    fn rest(&self, vcpu_threads: &VcpuThreads) {
        let Some(rings) = self.rings else { return };
        let vcpu = self.vcpu.into();
        rings.quota().stand_still(vcpu, || {
            vcpu_threads.rest_till(|| rings.quota().due_ns(vcpu));
        });
    }

    fn make_room(&mut self) -> Result<(), String> {
        let rings = self.rings.ok_or("its dirty ring is full, and it should have none")?;
        let made = rings
            .make_room(self.vcpu)
            .map_err(|error| format!("its full dirty ring cannot be reset: {error}"))?;
        self.full_in_vain = if made > 0 { 0 } else { self.full_in_vain + 1 };
        if self.full_in_vain > FULL_IN_VAIN_MAX {
            return Err("its dirty ring stays full, and there is nothing in it".to_owned());
        }
        Ok(())
    }

    fn port_out(&self, port: u16, data: &[u8]) -> Result<Back, String> {
        if port == PORT_BEAT
            && let Ok(count) = data.try_into().map(u32::from_le_bytes)
        {
            self.platform
                .heartbeat_device
                .beat(&self.platform.memory, self.vcpu, count)
                .map_err(|error| error.to_string())?;
        } else if PORTS_SERIAL.contains(&port) {
            data.iter().for_each(|&byte| self.console.write(serial_register(port), byte));
        } else {
            tracing::debug!("vCPU {} wrote {data:x?} to port {port:#x}, where there is nothing", self.vcpu);
        }
        Ok(Back::Served)
    }

    fn port_in(&self, port: u16, data: &mut [u8]) {
        // An empty bus reads as ones.
        data.fill(0xff);
        if PORTS_SERIAL.contains(&port) {
            data.iter_mut().for_each(|byte| *byte = self.console.read(serial_register(port)));
        }
    }
}

fn serial_register(port: u16) -> u8 {
    // The first of the eight ports is a multiple of eight.
    port.to_le_bytes()[0] & 7
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MachineConfig, Workload};
    use crate::guest::layout::PAYLOAD;
    use crate::guest::payload;
    use crate::kvm::engine::KvmEngine;
    use crate::kvm::host;
    use crate::machine_core::Engine;

    /// KVM moves past a port access only at the next entry. A state saved before that would make the guest
    /// repeat the access.
    #[test]
    fn a_port_access_is_finished_before_the_vcpu_stands_still() {
        let kvm = match host::open() {
            Ok(kvm) => kvm,
            Err(error) if std::env::var_os("STERNA_LAB").is_none() => {
                eprintln!("skipped: {error}");
                return;
            }
            Err(error) => panic!("a lab must have KVM: {error}"),
        };
        let workload = Workload { working_set_bytes: 0, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
        let config = MachineConfig { memory_bytes: 16 << 20, vcpus: 1, hugepages: None, workload };
        let platform = Platform::new(config).unwrap();
        let engine = KvmEngine::new(&kvm, &platform, None).unwrap();
        engine.prepare(&platform).unwrap();
        let mut thread = VcpuThread::new(0, &platform, &engine.console, None);
        let mut fd = engine.vcpu(0);
        for said in 1..5 {
            while engine.console().len() < said {
                fd.set_kvm_immediate_exit(0);
                thread.enter(&mut fd).unwrap();
            }
            thread.finish_io(&mut fd).unwrap();
            assert_eq!(engine.console().len(), said, "nothing is said twice, and nothing more");
            let next = usize::try_from(fd.get_regs().unwrap().rip - PAYLOAD).unwrap();
            assert_eq!(payload::code()[next - 1], 0xee, "the instruction before is `out dx, al`");
        }
        assert_eq!(engine.console(), b"ster");
    }
}

//! Shared by the tests: machines of both kinds, waiting, and copying RAM as a migration would.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use sterna_vmm::{
    GuestRam, Machine, MachineConfig, MachineError, PAGE_BYTES, SharedMachine, Workload, host_cpu, new_kvm,
    new_synthetic,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
const PAGE_LEN: usize = 4096;
const CHUNK_LEN: usize = 1 << 20;

/// Long enough for a loaded host that interprets guests; only a failing test waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) type Constructor = fn(MachineConfig) -> Result<SharedMachine, MachineError>;

/// The kinds of machine that this host can run.
pub(crate) fn kinds() -> Vec<Constructor> {
    let mut kinds: Vec<Constructor> = vec![new_synthetic];
    kinds.extend(kvm());
    kinds
}

/// The real machine, if this host and this user can run it.
pub(crate) fn kvm() -> Option<Constructor> {
    let Err(lack @ (MachineError::KvmMissing | MachineError::KvmPermission)) = host_cpu() else {
        return Some(new_kvm);
    };
    assert!(std::env::var_os("STERNA_LAB").is_none(), "a lab must have KVM: {lack}");
    eprintln!("skipped for the real machine: {lack}");
    None
}

pub(crate) fn config(memory_bytes: u64, vcpus: u8, workload: Workload) -> MachineConfig {
    MachineConfig { memory_bytes, vcpus, hugepages: None, workload }
}

/// Writes over 1 MiB again and again.
pub(crate) fn busy() -> Workload {
    Workload { working_set_bytes: MIB, rate_mb_per_s: 20, prefill: false, sweepers: 0 }
}

/// Has 1 MiB of pattern and nothing to write.
pub(crate) fn idle() -> Workload {
    Workload { working_set_bytes: MIB, rate_mb_per_s: 0, prefill: true, sweepers: 0 }
}

pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until every vCPU has beaten some more and a sweeping guest has finished one more pass.
pub(crate) fn run_on(machine: &dyn Machine) {
    let before = machine.status();
    until("the guest runs on", || {
        let now = machine.status();
        assert_eq!(now.phase, before.phase);
        let beaten = now
            .vcpus
            .iter()
            .zip(&before.vcpus)
            .all(|(now, before)| now.heartbeat.count > before.heartbeat.count + 3);
        let swept = machine.config().workload.rate_mb_per_s == 0 || now.passes > before.passes;
        beaten && swept
    });
}

pub(crate) fn read(memory: &GuestRam, page: u64) -> Vec<u8> {
    let mut content = vec![0; PAGE_LEN];
    memory.read_slice(&mut content, GuestAddress(page * PAGE_BYTES)).unwrap();
    content
}

pub(crate) fn write(memory: &GuestRam, page: u64, content: &[u8]) {
    memory.write_slice(content, GuestAddress(page * PAGE_BYTES)).unwrap();
}

/// The pages that are not all zero: page number and content. Reads the memfd, so that holes stay holes.
pub(crate) fn touched_pages(memory: &GuestRam) -> Vec<(u64, Vec<u8>)> {
    let mut touched = Vec::new();
    let (zeros, mut chunk) = (vec![0u8; CHUNK_LEN], vec![0u8; CHUNK_LEN]);
    for region in memory.iter() {
        let file = region.file_offset().unwrap();
        for at in (0..region.len()).step_by(CHUNK_LEN) {
            let len = CHUNK_LEN.min(usize::try_from(region.len() - at).unwrap());
            file.file().read_exact_at(&mut chunk[..len], file.start() + at).unwrap();
            if chunk[..len] == zeros[..len] {
                continue;
            }
            for (index, content) in (0..).zip(chunk[..len].chunks(PAGE_LEN)) {
                if *content != zeros[..content.len()] {
                    touched.push(((region.start_addr().0 + at) / PAGE_BYTES + index, content.to_vec()));
                }
            }
        }
    }
    touched
}

/// Copies all of a paused machine's RAM into a fresh machine's.
pub(crate) fn copy_ram(from: &dyn Machine, to: &dyn Machine) {
    for (page, content) in touched_pages(from.memory()) {
        write(to.memory(), page, &content);
    }
}

/// Empties the software bitmap: returns the pages that the VMM wrote since the last call.
pub(crate) fn take_software_dirty(memory: &GuestRam) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in memory.iter() {
        region.get_mmap().bitmap().take(|index, word| {
            let base = region.start_addr().0 / PAGE_BYTES + index as u64 * 64;
            pages.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| base + bit));
        });
    }
    pages
}

/// Moves the guest of a machine into a fresh one of the same kind and checks it there.
pub(crate) fn move_guest(from: &dyn Machine, new: Constructor) -> SharedMachine {
    from.pause().unwrap();
    let before = from.status();
    let state = from.save().unwrap();
    let to = new(from.config().clone()).unwrap();
    copy_ram(from, &*to);
    to.load(&state).unwrap();
    let outside = to.check_from_outside().unwrap();
    assert_eq!(outside.wrong, 0, "{outside:?}");
    assert_eq!(to.heartbeat().count, from.heartbeat().count, "nothing has run yet");
    from.stop();

    to.resume().unwrap();
    run_on(&*to);
    let inside = to.check_from_inside(PATIENCE).unwrap();
    assert_eq!(inside.wrong, 0, "{inside:?}");
    assert_eq!(inside.pages, outside.pages);
    for (now, before) in to.status().vcpus.iter().zip(&before.vcpus) {
        assert_eq!(now.heartbeat.regressions, 0, "every beat is the last one's successor");
        assert!(now.heartbeat.count > before.heartbeat.count);
        assert!(now.pages_written >= before.pages_written);
    }
    to
}

//! The share of this process's CPU time that is its own, and not the kernel's on its behalf.
//!
//! Kernels count that share, but User-mode Linux attributes all time to the kernel. So this module samples:
//! `ITIMER_PROF` sends a signal for each tick of CPU time that the process spends. Where the signal finds a
//! thread at the return from a system call, the tick was the kernel's; anywhere else it was the thread's. The
//! instruction `syscall` leaves its return address in the register `rcx` (Intel SDM, volume 2, SYSCALL). So
//! `rcx` equals the instruction pointer in the first case, and hardly ever in the second.
#![expect(
    unsafe_code,
    reason = "sigaction(2), setitimer(2), and the registers that a signal handler is shown"
)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cpu::CpuTime;
use super::failure::Failure;

static OWN: AtomicU64 = AtomicU64::new(0);
static KERNELS: AtomicU64 = AtomicU64::new(0);

/// Samples from its creation to [`end`](Self::end).
#[derive(Debug)]
pub(crate) struct Profile {
    before: CpuTime,
}

impl Profile {
    pub(crate) fn begin() -> Result<Self, Failure> {
        OWN.store(0, Ordering::Relaxed);
        KERNELS.store(0, Ordering::Relaxed);
        handle_ticks().map_err(Failure::system("handle SIGPROF"))?;
        let before = CpuTime::of_this_process()?;
        set_timer(TICK_US).map_err(Failure::system("set a timer of CPU time"))?;
        Ok(Self { before })
    }

    /// The process's CPU time since the beginning, in two parts.
    pub(crate) fn end(self) -> Result<CpuTime, Failure> {
        set_timer(0).map_err(Failure::system("end a timer of CPU time"))?;
        let spent = CpuTime::of_this_process()?.since(self.before).total_s();
        let (own, kernels) = (OWN.load(Ordering::Relaxed), KERNELS.load(Ordering::Relaxed));
        if own + kernels == 0 {
            return Err(Failure::TooShort("the profile of CPU time".into()));
        }
        let user_s = spent * own as f64 / (own + kernels) as f64;
        Ok(CpuTime { user_s, system_s: spent - user_s })
    }
}

/// The kernel rounds this up to its own tick.
const TICK_US: i64 = 1000;

fn set_timer(tick_us: i64) -> io::Result<()> {
    let tick = libc::timeval { tv_sec: 0, tv_usec: tick_us };
    let timer = libc::itimerval { it_interval: tick, it_value: tick };
    // SAFETY: `timer` is a whole itimerval for the length of the call, and the old value is not requested.
    let result = unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const timer, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The handler stays installed: a signal still pending when the timer has ended must not end the process.
fn handle_ticks() -> io::Result<()> {
    // SAFETY: sigaction is integers, a set of bits and a pointer that may be null: all zeros is a valid
    // value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_tick as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: `action` is whole for the length of the call; the handler accesses two atomics and its
    // arguments.
    let result = unsafe { libc::sigaction(libc::SIGPROF, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_tick(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: with SA_SIGINFO the kernel passes a pointer to the interrupted thread's context, valid for this
    // call.
    let registers = unsafe { &raw const (*context).uc_mcontext.gregs };
    // SAFETY: the array is part of the context; no other code accesses it.
    let registers = unsafe { registers.read() };
    let [next, returns_to] =
        [libc::REG_RIP, libc::REG_RCX].map(|register| registers[usize::try_from(register).unwrap_or(0)]);
    // An interrupted call that restarts returns to its own two bytes.
    let in_kernel = next == returns_to || next.wrapping_add(2) == returns_to;
    (if in_kernel { &KERNELS } else { &OWN }).fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::hint::black_box;
    use std::io::Read;
    use std::process::Command;

    use super::*;

    fn spend(seconds: f64, mut work: impl FnMut()) -> CpuTime {
        let before = CpuTime::of_this_process().unwrap();
        let profile = Profile::begin().unwrap();
        while CpuTime::of_this_process().unwrap().since(before).total_s() < seconds {
            work();
        }
        profile.end().unwrap()
    }

    /// Marks a process that runs this test alone.
    const ALONE: &str = "STERNA_BENCH_TEST_ALONE";

    #[test]
    fn a_loop_is_our_own_and_a_long_read_is_the_kernels() {
        if env::var_os(ALONE).is_none() {
            // A profile covers a process, and other tests in this process spend time of either kind
            // meanwhile.
            let name = concat!(module_path!(), "::a_loop_is_our_own_and_a_long_read_is_the_kernels");
            let name = name.split_once("::").unwrap().1;
            let mut alone = Command::new(env::current_exe().unwrap());
            let alone = alone.args(["--exact", name]).env(ALONE, "1").output().unwrap();
            let said = String::from_utf8_lossy(&alone.stdout);
            assert!(alone.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let own = spend(0.5, || {
            black_box((0..10_000_000_u64).fold(0, |sum, n| black_box(sum ^ n)));
        });
        let mut zeros = File::open("/dev/zero").unwrap();
        let mut buffer = vec![0; 64 << 20];
        let kernels = spend(0.5, || zeros.read_exact(&mut buffer).unwrap());
        let share = |spent: CpuTime| spent.system_s / spent.total_s();
        assert!(share(own) < 0.5 && share(kernels) > 0.5, "{own:?} {kernels:?}");
    }
}

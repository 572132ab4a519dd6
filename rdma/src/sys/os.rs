//! The three system calls that the verbs need beside the library's own.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Makes reads of `fd` return EAGAIN instead of blocking.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument and accesses no memory; the descriptor is open while borrowed.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes an int and accesses no memory; the descriptor is open while borrowed.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sleeps until `fd` is readable or `timeout` has passed; returns whether it is readable. A signal does not
/// end the sleep.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let (start, mut left) = (Instant::now(), timeout);
    loop {
        // Rounded up: a wait of 0.5 ms must not become a busy loop of zero-length ones.
        let left_ms = i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `entry` is one pollfd, live and exclusively borrowed for the length of the call.
        let ready = unsafe { libc::poll(&raw mut entry, 1, left_ms) };
        match ready {
            1.. => return Ok(true),
            0 if start.elapsed() >= timeout => return Ok(false),
            0 => {}
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
        left = timeout.saturating_sub(start.elapsed());
    }
}

/// The soft limit on locked memory; `None` when unlimited or unknown.
pub(crate) fn memlock_limit_bytes() -> Option<u64> {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: `limit` is a writable rlimit for the length of the call.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr()) };
    if result != 0 {
        return None;
    }
    // SAFETY: getrlimit returned success, so it has filled the struct.
    let limit = unsafe { limit.assume_init() };
    (limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

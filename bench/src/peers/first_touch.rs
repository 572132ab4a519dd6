//! Memory that the machine has not yet received from its host.
//!
//! A virtual machine, and User-mode Linux most of all, gets each page of its memory from the host at the
//! first touch. That costs several times what this comparison measures. Without this step, the first
//! measurement would pay for the later ones.

use std::fs::{self, File};
use std::io::Write;

use rustix::fs::{MemfdFlags, memfd_create};

use super::failure::Failure;

/// The memory left to the rest of the machine meanwhile: at least this, and an eighth of the free memory.
const LEFT_BYTES_MIN: u64 = 256 << 20;

/// A larger machine has already received this much memory from its host.
const TOUCHED_BYTES_MAX: u64 = 32 << 30;

const CHUNK_LEN: usize = 1 << 20;

/// Touches this machine's free memory and frees it again; returns the number of bytes.
///
/// It writes a file in memory: the kernel does that without mapping pages, each of which costs User-mode
/// Linux a system call.
pub(crate) fn touch_free_memory() -> Result<u64, Failure> {
    const MEMINFO: &str = "/proc/meminfo";
    let text = fs::read_to_string(MEMINFO).map_err(Failure::system(format!("read {MEMINFO}")))?;
    let free = free_bytes(&text)
        .ok_or_else(|| Failure::Words { what: MEMINFO.into(), said: text.chars().take(100).collect() })?;
    let left = LEFT_BYTES_MIN.max(free / 8);
    let chunks = free.saturating_sub(left).min(TOUCHED_BYTES_MAX) / CHUNK_LEN as u64;
    let failed = || Failure::system("write a file in memory");
    let file = memfd_create("sterna-bench-touch", MemfdFlags::CLOEXEC);
    let mut file = File::from(file.map_err(|error| failed()(error.into()))?);
    let chunk = [0; CHUNK_LEN];
    (0..chunks).try_for_each(|_| file.write_all(&chunk)).map_err(failed())?;
    Ok(chunks * CHUNK_LEN as u64)
}

/// proc(5): `MemFree: 123 kB`. Page cache does not count, because it has been touched.
fn free_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_in_bytes() {
        let text = "MemTotal:        8000 kB\nMemFree:          123 kB\nMemAvailable:    7000 kB\n";
        assert_eq!(free_bytes(text), Some(123 << 10));
        assert_eq!(free_bytes("MemTotal: 8000 kB\n"), None);
    }
}

//! CPU time, as the kernel counts it.

use std::fs;
use std::process;

use super::failure::Failure;

/// The unit of times in /proc: `USER_HZ`, 100 a second on every Linux that Sterna runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct CpuTime {
    /// In the programs themselves.
    pub(crate) user_s: f64,
    /// In the kernel, including soft-RoCE's work where the kernel does it on behalf of a program.
    pub(crate) system_s: f64,
}

impl CpuTime {
    /// The CPU time of the whole machine since its start, interrupts included.
    pub(crate) fn of_machine() -> Result<Self, Failure> {
        read("/proc/stat", machine)
    }

    /// The CPU time of a process that still exists, all threads included.
    pub(crate) fn of_process(id: u32) -> Result<Self, Failure> {
        read(&format!("/proc/{id}/stat"), |text| process_ticks(text, 11))
    }

    /// The CPU time of this process.
    pub(crate) fn of_this_process() -> Result<Self, Failure> {
        Self::of_process(process::id())
    }

    /// The CPU time of the children of this process that have ended and were waited for.
    pub(crate) fn of_ended_children() -> Result<Self, Failure> {
        read("/proc/self/stat", |text| process_ticks(text, 13))
    }

    pub(crate) fn total_s(self) -> f64 {
        self.user_s + self.system_s
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { user_s: self.user_s - before.user_s, system_s: self.system_s - before.system_s }
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self { user_s: self.user_s + other.user_s, system_s: self.system_s + other.system_s }
    }
}

fn read(path: &str, parse: impl Fn(&str) -> Option<CpuTime>) -> Result<CpuTime, Failure> {
    let text = fs::read_to_string(path).map_err(Failure::system(format!("read {path}")))?;
    parse(&text).ok_or_else(|| Failure::Words { what: path.into(), said: text.chars().take(100).collect() })
}

/// proc(5): `cpu` and the ticks in user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice.
/// The first two include the last two; time that a hypervisor stole was not spent on this machine.
fn machine(text: &str) -> Option<CpuTime> {
    let mut words = text.lines().next()?.split_ascii_whitespace();
    (words.next()? == "cpu").then_some(())?;
    let ticks: Vec<f64> = words.map_while(|word| word.parse().ok()).collect();
    let &[user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks.as_slice() else { return None };
    Some(seconds(user + nice, system + irq + softirq))
}

/// proc(5): field 2, the program's name in brackets, may contain anything. `index` counts from field 3.
fn process_ticks(text: &str, index: usize) -> Option<CpuTime> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut words = rest.split_ascii_whitespace().skip(index);
    Some(seconds(words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn seconds(user_ticks: f64, system_ticks: f64) -> CpuTime {
    CpuTime { user_s: user_ticks / TICKS_PER_SECOND, system_s: system_ticks / TICKS_PER_SECOND }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 250 35 45 20 0 1 0 9";
        assert_eq!(process_ticks(text, 11), Some(CpuTime { user_s: 1.5, system_s: 2.5 }));
        assert_eq!(process_ticks(text, 13), Some(CpuTime { user_s: 0.35, system_s: 0.45 }));
        assert_eq!(process_ticks("7 (a", 11), None);
        assert_eq!(process_ticks("7 (a) S 1", 11), None);
    }

    #[test]
    fn idle_time_is_not_spent() {
        let text = "cpu  100 20 300 4000 50 6 7 8 0 0\ncpu0 1 2 3";
        let spent = machine(text).unwrap();
        assert!((spent.user_s - 1.2).abs() < 1e-9 && (spent.system_s - 3.13).abs() < 1e-9, "{spent:?}");
        assert_eq!(machine("intr 1 2 3 4 5 6 7 8"), None);
        assert_eq!(machine("cpu 1 2"), None);
        assert_eq!(machine(""), None);
    }

    #[test]
    fn this_machine_is_understood() {
        assert!(CpuTime::of_machine().unwrap().total_s() > 0.0);
        assert!(CpuTime::of_this_process().is_ok() && CpuTime::of_ended_children().is_ok());
    }
}

//! A machine's vCPU threads: pausing, throttling and resuming them.
//!
//! A thread asks [`VcpuThreads::wanted`] before every entry into the guest. When it is wanted, it calls
//! [`VcpuThreads::wait`], which returns when the thread may continue. A signal brings a thread inside the
//! guest out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::c_int;
use vmm_sys_util::signal::Killable;

use crate::clock::monotonic_ns;
use crate::error::MachineError;
use crate::poison::IgnorePoison;

/// What a thread does after [`VcpuThreads::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    GoOn,
    Leave,
}

/// The vCPU threads of one machine.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    /// Whether any of `Orders` wants the threads in `wait`. Read without the lock.
    wanted: AtomicBool,
    orders: Mutex<Orders>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The signal that brings a thread out of the guest; none where threads look at `wanted` often.
    kick: Option<c_int>,
}

#[derive(Debug, Default)]
struct Orders {
    pause: bool,
    /// The throttle's share of the window.
    rest: bool,
    leave: bool,
    throttle_percent: u8,
    throttler: bool,
    /// How many threads have started; stand still because of `pause`; have ended.
    started: usize,
    quiet: usize,
    ended: usize,
    failed: Option<String>,
}

impl Orders {
    fn wanted(&self) -> bool {
        self.pause || self.rest || self.leave
    }
}

impl VcpuThreads {
    pub(crate) fn new(kick: Option<c_int>) -> Arc<Self> {
        Arc::new(Self {
            wanted: AtomicBool::new(false),
            orders: Mutex::default(),
            changed: Condvar::new(),
            threads: Mutex::default(),
            kick,
        })
    }

    /// Starts a vCPU thread. An error or a panic of `work` is the machine's failure.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        name: String,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), MachineError> {
        self.orders().started += 1;
        let vcpu_threads = Arc::clone(self);
        self.thread(name, move || {
            let mut end = EndOfThread {
                vcpu_threads: &vcpu_threads,
                failure: Some("a thread of the VMM panicked".to_owned()),
            };
            end.failure = work().err();
        })
        .inspect_err(|_| self.orders().started -= 1)
    }

    /// Whether the calling thread must come to [`wait`](Self::wait).
    pub(crate) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Blocks the thread while the machine is paused or throttled. The caller must have finished all work of
    /// the guest.
    pub(crate) fn wait(&self) -> Then {
        let mut orders = self.orders();
        let mut quiet = false;
        loop {
            if orders.pause != quiet {
                quiet = orders.pause;
                if quiet {
                    orders.quiet += 1;
                } else {
                    orders.quiet -= 1;
                }
                self.changed.notify_all();
            }
            if orders.leave {
                return Then::Leave;
            }
            if !orders.pause && !orders.rest {
                return Then::GoOn;
            }
            orders = self.changed.wait(orders).ignore_poison();
        }
    }

    /// Sleeps until this time, or until the calling thread is wanted. Returns the time then.
    pub(crate) fn sleep_till(&self, due_ns: u64) -> u64 {
        self.rest_till(|| due_ns)
    }

    /// The same for a time that may change meanwhile: [`wake`](Self::wake) has it asked again.
    pub(crate) fn rest_till(&self, due_ns: impl Fn() -> u64) -> u64 {
        let mut orders = self.orders();
        loop {
            let (now, due_ns) = (monotonic_ns(), due_ns());
            if now >= due_ns || orders.wanted() {
                return now;
            }
            let left = Duration::from_nanos(due_ns - now);
            orders = self.changed.wait_timeout(orders, left).ignore_poison().0;
        }
    }

    /// Wakes threads that rest.
    pub(crate) fn wake(&self) {
        self.order(|_| {});
    }

    /// Stops all threads and returns when they stand still.
    pub(crate) fn pause(&self) -> Result<(), MachineError> {
        self.order(|orders| orders.pause = true);
        let mut orders = self.orders();
        while orders.quiet + orders.ended < orders.started {
            drop(orders);
            self.kick_all();
            // One signal is enough; repeating it is free and depends on no kernel's signal semantics.
            let again = Duration::from_millis(20);
            orders =
                self.wait_while(self.orders(), again, |orders| orders.quiet + orders.ended < orders.started);
        }
        drop(orders);
        self.alive()
    }

    /// Makes threads stand still as soon as they start.
    pub(crate) fn hold(&self) {
        self.order(|orders| orders.pause = true);
    }

    pub(crate) fn resume(&self) {
        self.order(|orders| orders.pause = orders.failed.is_some());
    }

    /// Why the guest cannot continue, if so.
    pub(crate) fn alive(&self) -> Result<(), MachineError> {
        match &self.orders().failed {
            None => Ok(()),
            Some(reason) => Err(MachineError::GuestFailed { reason: reason.clone() }),
        }
    }

    pub(crate) fn throttle_percent(&self) -> u8 {
        self.orders().throttle_percent
    }

    /// Makes the threads rest this share of the time. The first call with a share starts a timer thread.
    pub(crate) fn throttle(self: &Arc<Self>, percent: u8) -> Result<(), MachineError> {
        let start = {
            let mut orders = self.orders();
            let start = percent > 0 && !orders.throttler;
            orders.throttler |= start;
            start
        };
        if start {
            let vcpu_threads = Arc::clone(self);
            self.thread("throttle".to_owned(), move || vcpu_threads.beat_throttle())
                .inspect_err(|_| self.orders().throttler = false)?;
        }
        self.order(|orders| {
            orders.throttle_percent = percent;
            orders.rest &= percent > 0;
        });
        Ok(())
    }

    /// Starts a thread that does `work` again and again, each time after as long as it said, until the
    /// threads end.
    pub(crate) fn repeat(
        self: &Arc<Self>,
        name: &str,
        mut work: impl FnMut() -> Duration + Send + 'static,
    ) -> Result<(), MachineError> {
        let vcpu_threads = Arc::clone(self);
        self.thread(name.to_owned(), move || {
            let mut after = Duration::ZERO;
            while !vcpu_threads.wait_while(vcpu_threads.orders(), after, |orders| !orders.leave).leave {
                after = work();
            }
        })
    }

    /// Brings the thread of one vCPU out of the guest.
    pub(crate) fn kick_vcpu(&self, vcpu: usize) {
        let name = vcpu_thread(vcpu);
        let threads = self.threads.lock().ignore_poison();
        let of_vcpu = |handle: &&JoinHandle<()>| handle.thread().name() == Some(name.as_str());
        threads.iter().filter(of_vcpu).for_each(|handle| self.kick(handle));
    }

    /// Ends all threads.
    pub(crate) fn stop(&self) {
        self.order(|orders| orders.leave = true);
        self.kick_all();
        let threads = std::mem::take(&mut *self.threads.lock().ignore_poison());
        for handle in threads {
            while !handle.is_finished() {
                self.kick(&handle);
                thread::sleep(Duration::from_micros(200));
            }
            // A panic has already become the machine's failure.
            let _ = handle.join();
        }
    }

    fn beat_throttle(&self) {
        let mut orders = self.orders();
        while !orders.leave {
            let percent = orders.throttle_percent;
            if percent == 0 || orders.pause {
                orders = self.changed.wait(orders).ignore_poison();
                continue;
            }
            let same =
                |orders: &mut Orders| orders.throttle_percent == percent && !orders.leave && !orders.pause;
            let (run, rest) = throttle_window(percent);
            orders = self.wait_while(orders, run, same);
            if !same(&mut orders) {
                continue;
            }
            drop(orders);
            self.order(|orders| orders.rest = orders.throttle_percent == percent);
            self.kick_all();
            orders = self.wait_while(self.orders(), rest, same);
            drop(orders);
            self.order(|orders| orders.rest = false);
            orders = self.orders();
        }
    }

    fn thread(&self, name: String, work: impl FnOnce() + Send + 'static) -> Result<(), MachineError> {
        let handle = thread::Builder::new()
            .name(name.clone())
            .spawn(work)
            .map_err(|source| MachineError::Thread { name, source })?;
        self.threads.lock().ignore_poison().push(handle);
        Ok(())
    }

    /// Changes the orders and wakes all threads.
    fn order(&self, change: impl FnOnce(&mut Orders)) {
        let mut orders = self.orders();
        change(&mut orders);
        self.wanted.store(orders.wanted(), Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().ignore_poison()
    }

    fn wait_while<'a>(
        &self,
        orders: MutexGuard<'a, Orders>,
        at_most: Duration,
        condition: impl FnMut(&mut Orders) -> bool,
    ) -> MutexGuard<'a, Orders> {
        self.changed.wait_timeout_while(orders, at_most, condition).ignore_poison().0
    }

    fn kick_all(&self) {
        self.threads.lock().ignore_poison().iter().for_each(|handle| self.kick(handle));
    }

    fn kick(&self, handle: &JoinHandle<()>) {
        if let Some(signal) = self.kick {
            // A thread that has ended needs no kick.
            let _ = handle.kill(signal);
        }
    }
}

/// The name of a vCPU's thread.
pub(crate) fn vcpu_thread(vcpu: usize) -> String {
    format!("vcpu {vcpu}")
}

/// Reports the end of a thread, however it ended.
struct EndOfThread<'a> {
    vcpu_threads: &'a VcpuThreads,
    failure: Option<String>,
}

impl Drop for EndOfThread<'_> {
    fn drop(&mut self) {
        let failure = self.failure.take();
        self.vcpu_threads.order(|orders| {
            orders.ended += 1;
            if let Some(reason) = failure {
                orders.failed.get_or_insert(reason);
                orders.pause = true;
            }
        });
        self.vcpu_threads.kick_all();
    }
}

/// How long to run and how long to rest, in windows of 10 ms; longer where running would fall below 1 ms.
fn throttle_window(percent: u8) -> (Duration, Duration) {
    let run_percent = u64::from(100 - percent.min(99));
    let window_us = (100_000 / run_percent).max(10_000);
    let run_us = window_us * run_percent / 100;
    (Duration::from_micros(run_us), Duration::from_micros(window_us - run_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttle_window_has_the_share_it_should() {
        for percent in 1..=99u8 {
            let (run, rest) = throttle_window(percent);
            assert!(run >= Duration::from_micros(100));
            let share = rest.as_secs_f64() / (run + rest).as_secs_f64() * 100.0;
            assert!((share - f64::from(percent)).abs() < 1.0, "{percent}: {run:?} {rest:?}");
        }
        assert_eq!(throttle_window(99), (Duration::from_millis(1), Duration::from_millis(99)));
    }

    #[test]
    fn paused_threads_stand_still_and_a_failure_reaches_the_caller() {
        let vcpu_threads = VcpuThreads::new(None);
        for index in 0..3 {
            let gate = Arc::clone(&vcpu_threads);
            let work = move || {
                loop {
                    if gate.wanted() && gate.wait() == Then::Leave {
                        return Ok(());
                    }
                    if index == 2 && gate.throttle_percent() == 1 {
                        return Err("broken".to_owned());
                    }
                    thread::yield_now();
                }
            };
            vcpu_threads.spawn(format!("worker {index}"), work).unwrap();
        }
        for _ in 0..20 {
            vcpu_threads.pause().unwrap();
            assert_eq!(vcpu_threads.orders().quiet, 3);
            vcpu_threads.resume();
        }
        vcpu_threads.throttle(1).unwrap();
        while vcpu_threads.alive().is_ok() {
            thread::yield_now();
        }
        let error = vcpu_threads.pause().unwrap_err();
        assert!(matches!(error, MachineError::GuestFailed { reason } if reason == "broken"));
        vcpu_threads.stop();
        assert_eq!(vcpu_threads.orders().ended, 3);
    }
}

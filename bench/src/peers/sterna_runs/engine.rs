//! The engine between two guests in this process: source and destination are threads, connected as hosts are.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sterna::convergence::{IfStuckError, Limits};
use sterna::destination::Receiver;
use sterna::progress::{Event, Observer, Report};
use sterna::source::{LimitsHandle, MigrationFailure, Options};
use sterna::state::HostState;
use sterna::transport::Transports;
use sterna::transport::rdma::RdmaProvider;
use sterna::transport::tcp::TcpProvider;
use sterna::trust::Security;

use super::guest::{BenchGuest, BenchHost, Content, Pages, Script};
use crate::peers::compare::equal_files;
use crate::peers::cpu::CpuTime;
use crate::peers::failure::Failure;
use crate::peers::migration::Migration;
use crate::peers::profile::Profile;
use crate::peers::setup::Setup;

/// The lanes' speed once all memory is registered, in MB/s.
#[derive(Clone, Debug)]
pub(crate) struct Lanes {
    pub(crate) all_pages: f64,
    pub(crate) every_second_page: f64,
    pub(crate) lanes: u8,
}

/// RAM of the guest in the timed rounds.
pub(crate) const LANES_RAM_BYTES: u64 = 256 << 20;

/// The number of timed rounds of each kind, all in memory that is registered and touched.
pub(crate) fn lane_rounds(setup: &Setup) -> usize {
    if setup.quick { 2 } else { 4 }
}

/// Moves a guest with a log that lists all pages in some rounds and every second page in others.
pub(crate) fn lanes(
    setup: &Setup,
    transports: impl Into<Transports>,
    lanes: Option<u8>,
) -> Result<Lanes, Failure> {
    let rounds = lane_rounds(setup);
    let kinds = [Pages::All, Pages::EverySecond];
    let script = kinds.map(|kind| vec![kind; rounds]).concat();
    let guest = BenchGuest::new(LANES_RAM_BYTES, Content::Addresses)?.with_script(Script(script));
    // Only a round without pages is short enough to switch.
    let downtime = Duration::from_millis(25);
    let limits = Limits { downtime, rounds_max: 1000, throttle_max_percent: 0, ..Limits::default() };
    let limits = LimitsHandle::new(limits);
    let heard = Heard::default();
    let options = Options { transports: transports.into(), lanes, limits, ..Options::default() };
    let moved = migrate(setup, &guest, &options, &heard)?;
    // The first round registers the memory and touches it at the destination.
    let scripted = moved.report.rounds.get(1..=2 * rounds).unwrap_or_default();
    let mut scripted = scripted.chunks_exact(rounds);
    let mut speed = |bytes: u64| match scripted.next() {
        Some(of_kind) if of_kind.iter().all(|round| round.bytes == bytes) => {
            let ms: f64 = of_kind.iter().map(|round| round.ms).sum();
            Ok((bytes * rounds as u64) as f64 / 1e3 / ms)
        }
        _ => Err(Failure::Sterna("the rounds did not send what the log said".into())),
    };
    Ok(Lanes {
        all_pages: speed(LANES_RAM_BYTES)?,
        every_second_page: speed(LANES_RAM_BYTES / 2)?,
        lanes: heard.lanes()?,
    })
}

/// Moves an idle guest by RDMA, a few times; returns the process's own share of its CPU time, in seconds a
/// GiB moved.
pub(crate) fn own_cpu_s_per_gib(setup: &Setup) -> Result<f64, Failure> {
    let guest = BenchGuest::new(setup.ram_bytes, Content::Addresses)?;
    let options = Options { transports: RdmaProvider::default().into(), ..Options::default() };
    let (mut own_s, mut moved_bytes) = (0.0, 0);
    while moved_bytes < PROFILED_BYTES_MIN {
        let moved = migrate_and(setup, &guest, &options, &Heard::default(), |migrate| {
            let profile = Profile::begin()?;
            let moved = migrate();
            own_s += profile.end()?.user_s;
            moved
        })?;
        moved_bytes += moved.report.bytes_sent;
    }
    Ok(own_s / (moved_bytes as f64 / f64::from(1 << 30)))
}

/// A profile consists of samples, a hundred a second where the kernel's ticks are that long.
const PROFILED_BYTES_MIN: u64 = 3 << 30;

/// Moves a guest with zeroed RAM by RDMA; returns an upper bound of the MB that left this machine's
/// interfaces meanwhile.
pub(crate) fn zeros_mb(setup: &Setup) -> Result<f64, Failure> {
    let guest = BenchGuest::new(setup.ram_bytes, Content::Zeros)?;
    let before = setup.device()?.sent_bytes_max()?;
    let options = Options { transports: RdmaProvider::default().into(), ..Options::default() };
    migrate(setup, &guest, &options, &Heard::default())?;
    Ok((setup.device()?.sent_bytes_max()? - before) as f64 / 1e6)
}

/// Moves a guest of this much RAM, only some MiB ever touched, over TCP on this machine.
pub(crate) fn sparse(ram_bytes: u64) -> Result<Report, Failure> {
    let guest = BenchGuest::new(ram_bytes, Content::Untouched)?.with_script(Script(Vec::new()));
    guest.touch(16 << 20)?;
    let options = Options { transports: TcpProvider.into(), ..Options::default() };
    let (moved, _) =
        move_guest(IpAddr::V4(Ipv4Addr::LOCALHOST), &guest, &options, &Heard::default(), |migrate| {
            migrate()
        })?;
    Ok(moved.report)
}

/// The speed of this many TCP lanes within this machine, in MB/s, and the processor time of both ends for
/// each GiB, in seconds.
pub(crate) fn lanes_within(lanes: u8, security: &Security) -> Result<(f64, f64), Failure> {
    const ROUNDS: usize = 6;
    let script = Script(vec![Pages::All; ROUNDS]);
    let guest = BenchGuest::new(LANES_RAM_BYTES, Content::Addresses)?.with_script(script);
    // The script's rounds are sent, whatever they promise.
    let if_stuck = "throttle".parse().map_err(|error: IfStuckError| Failure::Sterna(error.to_string()))?;
    let downtime = Duration::from_millis(25);
    let limits =
        Limits { downtime, rounds_max: 1000, throttle_max_percent: 0, if_stuck, ..Limits::default() };
    let options = Options {
        transports: TcpProvider.into(),
        lanes: Some(lanes),
        limits: LimitsHandle::new(limits),
        security: security.clone(),
        ..Options::default()
    };
    let before = CpuTime::of_this_process()?;
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (moved, _) = move_guest(address, &guest, &options, &Heard::default(), |migrate| migrate())?;
    let cpu_s = moved.cpu.1.since(before).total_s();
    // The first round touches the memory at the destination.
    let rounds = moved.report.rounds.get(1..=ROUNDS).unwrap_or_default();
    let ms: f64 = rounds.iter().map(|round| round.ms).sum();
    let bytes: u64 = rounds.iter().map(|round| round.bytes).sum();
    Ok((bytes as f64 / 1e3 / ms, cpu_s / (moved.report.bytes_sent as f64 / f64::from(1 << 30))))
}

/// Moves a guest that writes as fast as it can. `throttle` allows slowing it.
pub(crate) fn busy(
    setup: &Setup,
    transports: impl Into<Transports>,
    throttle: bool,
) -> Result<Migration, Failure> {
    let guest = BenchGuest::new(setup.ram_bytes, Content::Addresses)?.busy();
    let guest_mbps = guest.speed(Duration::from_secs(1));
    let defaults = Limits::default();
    let limits = Limits {
        downtime: Duration::from_millis(setup.downtime_ms.into()),
        throttle_max_percent: if throttle { defaults.throttle_max_percent } else { 0 },
        ..defaults
    };
    let heard = Heard::default();
    let cpu = || -> Result<_, Failure> { Ok((CpuTime::of_machine()?, CpuTime::of_this_process()?)) };
    let (machine_before, own_before) = cpu()?;
    let (transports, limits) = (transports.into(), LimitsHandle::new(limits));
    let options = Options { transports, limits, ..Options::default() };
    let moved = migrate(setup, &guest, &options, &heard)?;
    Ok(Migration {
        total_ms: moved.report.total_ms,
        wall_ms: moved.wall.as_secs_f64() * 1e3,
        setup_ms: Some(moved.report.setup_ms),
        downtime_ms: moved.report.downtime_ms,
        moved_mb: moved.report.bytes_sent as f64 / 1e6,
        machine_cpu: moved.cpu.0.since(machine_before),
        own_cpu: moved.cpu.1.since(own_before),
        destination_cpu: None,
        guest_mbps: Some(guest_mbps),
        throttle_percent: heard.throttled(),
    })
}

/// A migration that ended, with equal memory.
struct Moved {
    report: Report,
    wall: Duration,
    /// Of the machine and of this process, at the end.
    cpu: (CpuTime, CpuTime),
}

fn migrate(setup: &Setup, guest: &BenchGuest, options: &Options, heard: &Heard) -> Result<Moved, Failure> {
    migrate_and(setup, guest, options, heard, |migrate| migrate())
}

/// Migrates within `around`, then compares the guest's RAM at both ends, byte by byte.
fn migrate_and(
    setup: &Setup,
    guest: &BenchGuest,
    options: &Options,
    heard: &Heard,
    around: impl FnOnce(&mut dyn FnMut() -> Result<Moved, Failure>) -> Result<Moved, Failure>,
) -> Result<Moved, Failure> {
    // At a device's address, which is no loopback.
    let options = &Options { security: Security::insecure(), ..options.clone() };
    let (moved, arrived) = move_guest(setup.address(), guest, options, heard, around)?;
    compare(guest, &arrived)?;
    Ok(moved)
}

/// Migrates within `around`, to a destination that listens at an address of this machine; returns the arrived
/// guest, too.
fn move_guest(
    address: IpAddr,
    guest: &BenchGuest,
    options: &Options,
    heard: &Heard,
    around: impl FnOnce(&mut dyn FnMut() -> Result<Moved, Failure>) -> Result<Moved, Failure>,
) -> Result<(Moved, BenchGuest), Failure> {
    // No process asks for the fate of the bench's guest.
    let state = HostState::lost_with_this_process;
    let claim = state().start("bench", false).map_err(|error| Failure::Sterna(error.to_string()))?;
    let receiver = Receiver::bind(SocketAddr::new(address, 0), state())
        .map_err(|error| Failure::Sterna(error.to_string()))?
        .protected_by(options.security.clone());
    let address = receiver.local_address().map_err(|error| Failure::Sterna(error.to_string()))?;
    let (moved, arrival) = thread::scope(|scope| {
        let arriving =
            scope.spawn(|| receiver.receive(&BenchHost, &sterna::destination::Options::default(), &()));
        let mut migrate = || {
            let began = Instant::now();
            let report = sterna::source::migrate(guest, &claim, &address.to_string(), options, heard);
            let wall = began.elapsed();
            let report = report.map_err(|error| match error.cause {
                // The error states the number of rounds and a remedy.
                MigrationFailure::NotConverging { .. } => Failure::Sterna(error.cause.to_string()),
                _ => Failure::Sterna(error.to_string()),
            })?;
            Ok(Moved { report, wall, cpu: (CpuTime::of_machine()?, CpuTime::of_this_process()?) })
        };
        let moved = around(&mut migrate);
        let arrival = arriving.join().map_err(|_| Failure::Sterna("the destination panicked".into()));
        (moved, arrival)
    });
    let moved = moved?;
    let arrival = arrival?.map_err(|error| Failure::Sterna(error.to_string()))?;
    Ok((moved, arrival.guest))
}

/// Compares RAM. The guest is paused at the source, and nothing runs at the destination.
fn compare(source: &BenchGuest, destination: &BenchGuest) -> Result<(), Failure> {
    equal_files(source.file(), destination.file(), "the memory that sterna moved")
}

/// The events of a migration.
#[derive(Debug, Default)]
struct Heard(Mutex<Vec<Event>>);

impl Observer for Heard {
    fn event(&self, event: &Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
    }
}

impl Heard {
    fn throttled(&self) -> u8 {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let percents = events.iter().filter_map(|event| match event {
            Event::Throttled { percent, .. } => Some(*percent),
            _ => None,
        });
        percents.max().unwrap_or(0)
    }

    /// The number with which the description of the lanes begins.
    fn lanes(&self) -> Result<u8, Failure> {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let via = events.iter().find_map(|event| match event {
            Event::Connected { via, .. } => Some(via.clone()),
            _ => None,
        });
        let via = via.unwrap_or_default();
        let number = via.split(' ').next().and_then(|word| word.parse().ok());
        number.ok_or(Failure::Words { what: "sterna".into(), said: via })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::peers::device::RdmaDevice;

    /// A setup for TCP over loopback.
    fn setup() -> Setup {
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let device = RdmaDevice { name: String::new(), port: 1, gid_index: 0, address, mtu_bytes: 1024 };
        Setup {
            device: Some(device),
            sterna: "sterna".into(),
            qemu: "qemu-system-x86_64".into(),
            ram_bytes: 128 << 20,
            patience: Duration::from_secs(90),
            downtime_ms: 100,
            start_max: Duration::from_secs(60),
            quick: true,
        }
    }

    #[test]
    fn the_rounds_of_a_script_are_sent_and_all_memory_arrives() {
        let lanes = lanes(&setup(), TcpProvider, Some(2)).unwrap();
        assert_eq!(lanes.lanes, 2);
        assert!(lanes.all_pages > 0.0 && lanes.every_second_page > 0.0);
    }

    #[test]
    fn a_difference_in_one_byte_is_found() {
        let guest = || BenchGuest::new(4 << 20, Content::Addresses).unwrap();
        let (one, other) = (guest(), guest());
        compare(&one, &other).unwrap();
        other.file().write_all_at(&[1], 3 * 4096 + 4095).unwrap();
        assert!(matches!(compare(&one, &other), Err(Failure::Differs { page: 3, .. })));
    }
}

//! QEMU, with the same guest at both ends, driven over QMP.

mod boot;
mod by_sterna;
mod naming;
mod way;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use sterna_qemu::monitor::{MigrationReport, MigrationStatus, Monitor, Parameter, RunState};
use sterna_qemu::qmp::{Client, Notice};
use tempfile::TempDir;

pub(crate) use self::by_sterna::migrate_by_sterna;
pub(crate) use self::naming::time_to_name_all;
pub(crate) use self::way::Way;
use super::compare::equal_files;
use super::cpu::CpuTime;
use super::failure::Failure;
use super::migration::{Load, Migration};
use super::process::{Running, free_port};
use super::setup::Setup;

/// Moves a guest from one QEMU to another, and compares all of its RAM.
pub(crate) fn migrate(setup: &Setup, way: Way, load: Load) -> Result<Migration, Failure> {
    let Ends { folder, mut source, guest_mbps, mut destination } = Ends::start(setup, load)?;
    let address = setup.address();
    let uri = format!("{}:{}:{}", way.scheme(), address, free_port(address)?);
    for machine in [&mut destination, &mut source] {
        machine.prepare(way, setup.downtime_ms)?;
    }
    destination.monitor.migrate_incoming(&uri)?;

    let patience = match load {
        Load::Idle => setup.patience * 2,
        Load::Loop => setup.patience,
    };
    let (machine_before, own_before) = cpu_times(&source, &destination)?;
    let destination_before = CpuTime::of_process(destination.running.id())?;
    let began = Instant::now();
    let Some(report) = source.migrate(&uri, began + patience)? else {
        // Both processes end next, whether the source obeys this or not.
        let _ = source.monitor.migrate_cancel();
        return Err(match load {
            Load::Idle => Failure::NotEnded(patience),
            Load::Loop => Failure::NotConverged(patience),
        });
    };
    let wall = began.elapsed();
    let (machine_after, own_after) = cpu_times(&source, &destination)?;
    let destination_after = CpuTime::of_process(destination.running.id())?;
    destination.until_arrived()?;
    compare(way, &folder)?;
    let number = |value: Option<u64>, what| {
        let lacking = || Failure::Words { what: "QEMU".into(), said: format!("no {what} in {report:?}") };
        #[expect(clippy::cast_precision_loss, reason = "milliseconds and bytes of one migration")]
        value.map(|value| value as f64).ok_or_else(lacking)
    };
    Ok(Migration {
        total_ms: number(report.total_time, "total-time")?,
        wall_ms: wall.as_secs_f64() * 1e3,
        setup_ms: number(report.setup_time, "setup-time").ok(),
        downtime_ms: number(report.downtime, "downtime")?,
        moved_mb: number(report.ram.as_ref().map(|ram| ram.transferred), "ram.transferred")? / 1e6,
        machine_cpu: machine_after.since(machine_before),
        own_cpu: own_after.since(own_before),
        destination_cpu: Some(destination_after.since(destination_before)),
        guest_mbps,
        throttle_percent: 0,
    })
}

/// The CPU time of the whole machine, and of both processes.
fn cpu_times(source: &Machine, destination: &Machine) -> Result<(CpuTime, CpuTime), Failure> {
    let of = |machine: &Machine| CpuTime::of_process(machine.running.id());
    Ok((CpuTime::of_machine()?, of(source)?.and(of(destination)?)))
}

fn load_bytes(load: Load) -> u32 {
    match load {
        Load::Idle => 0,
        Load::Loop => u32::try_from(super::migration::LOOP_BYTES).unwrap_or(u32::MAX),
    }
}

/// A QEMU whose guest works, and one that waits for it.
struct Ends {
    folder: Folder,
    source: Machine,
    /// A busy guest's write speed, in MB/s.
    guest_mbps: Option<f64>,
    /// It stays paused once the guest has arrived, so that RAM can be compared.
    destination: Machine,
}

impl Ends {
    fn start(setup: &Setup, load: Load) -> Result<Self, Failure> {
        let folder = Folder::make(setup, load)?;
        let mut source = Machine::start(setup, &folder, "source", &[])?;
        source.until_touched()?;
        let guest_mbps = match load {
            Load::Idle => None,
            Load::Loop => Some(source.speed_of_loop(load_bytes(load))?),
        };
        let destination = Machine::start(setup, &folder, "destination", &["-S", "-incoming", "defer"])?;
        Ok(Self { folder, source, guest_mbps, destination })
    }
}

/// The guest's RAM at both ends and its boot sector, in memory.
struct Folder {
    folder: TempDir,
    disk: PathBuf,
    ram_bytes: u64,
}

impl Folder {
    fn make(setup: &Setup, load: Load) -> Result<Self, Failure> {
        let folder = setup.folder("qemu")?;
        let disk = folder.path().join("disk");
        let ram_end = u32::try_from(setup.ram_bytes).map_err(|_| Failure::System {
            doing: "boot so large a guest".into(),
            error: std::io::ErrorKind::InvalidInput.into(),
        })?;
        let loop_bytes = (load == Load::Loop).then(|| load_bytes(load));
        let write = || {
            let file = File::create(&disk)?;
            file.write_all_at(&boot::sector(ram_end, loop_bytes), 0)?;
            file.set_len(FLOPPY_BYTES)
        };
        write().map_err(Failure::system("write a boot sector"))?;
        Ok(Self { folder, disk, ram_bytes: setup.ram_bytes })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ram(&self, end: &str) -> PathBuf {
        self.path(&format!("{end}.ram"))
    }
}

const FLOPPY_BYTES: u64 = 1_474_560;

/// The longest wait for the answer to `migrate`, which comes once it is connected. With RDMA that takes
/// longest.
const MIGRATE_MAX: Duration = Duration::from_secs(60);

/// One QEMU.
struct Machine {
    running: Running,
    monitor: Monitor,
    ram: File,
}

impl Machine {
    fn start(setup: &Setup, folder: &Folder, end: &str, more: &[&str]) -> Result<Self, Failure> {
        let (socket, ram_path) = (folder.path(&format!("{end}.qmp")), folder.ram(end));
        let ram = File::create_new(&ram_path)
            .and_then(|_| File::options().read(true).open(&ram_path))
            .map_err(Failure::system("make a file for RAM"))?;
        let mut command = Command::new(&setup.qemu);
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-vga", "none"]);
        command.args(["-machine", "pc,memory-backend=ram", "-accel", "tcg,tb-size=32"]);
        command.args(["-m", &format!("{}M", folder.ram_bytes >> 20), "-object"]);
        command.arg(format!(
            "memory-backend-file,id=ram,share=on,prealloc={},size={},mem-path={}",
            if end == "source" { "on" } else { "off" },
            folder.ram_bytes,
            ram_path.display()
        ));
        command.arg("-drive");
        command.arg(format!("if=floppy,format=raw,readonly=on,file={}", folder.disk.display()));
        command
            .args(["-boot", "order=a", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", folder.path(&format!("{end}.sterna")).display()));
        command.args(more);
        let mut running = Running::start(&mut command, "qemu-system-x86_64", "qemu-system-x86")?;
        let client = running.until("open its QMP socket", setup.start_max, |_| {
            Ok(socket.exists().then(|| Client::connect(&socket)).and_then(Result::ok))
        })?;
        Ok(Self { running, monitor: Monitor::new(client), ram })
    }

    /// Waits until the guest has touched all of its RAM.
    fn until_touched(&mut self) -> Result<(), Failure> {
        let ram = &self.ram;
        self.running.until("touch the guest's RAM", Duration::from_secs(180), |_| {
            Ok((word(ram, boot::PHASE)? == boot::TOUCHED).then_some(()))
        })
    }

    /// The guest's write speed before the migration, in MB/s.
    fn speed_of_loop(&self, bytes: u32) -> Result<f64, Failure> {
        let (before, began) = (word(&self.ram, boot::PASSES)?, Instant::now());
        thread::sleep(Duration::from_secs(1));
        let passes = word(&self.ram, boot::PASSES)?.wrapping_sub(before);
        Ok(f64::from(passes) * f64::from(bytes) / 1e6 / began.elapsed().as_secs_f64())
    }

    /// The same limits as Sterna's, and no other.
    fn prepare(&self, way: Way, downtime_ms: u32) -> Result<(), Failure> {
        let capabilities = std::iter::once("events").chain(way.capability());
        self.monitor.set_capabilities(capabilities.map(|capability| (capability, true)))?;
        let mut parameters =
            vec![(Parameter::MaxBandwidth, 1 << 40), (Parameter::DowntimeLimit, downtime_ms.into())];
        if way == Way::Multifd {
            parameters.push((Parameter::MultifdChannels, 4));
        }
        Ok(self.monitor.set_parameters(parameters)?)
    }

    /// Sends the guest; returns the report of the migration, or none if it does not end by the deadline.
    /// QEMU is not asked meanwhile, because the answers cost processor time.
    fn migrate(&mut self, uri: &str, deadline: Instant) -> Result<Option<MigrationReport>, Failure> {
        let client = self.monitor.client();
        let events = client.subscribe();
        client.execute_within(MIGRATE_MAX, "migrate", &json!({ "uri": uri }))?;
        while let Some(notice) = events.next(deadline) {
            let status = match notice {
                Notice::Event(event) if event.name == "MIGRATION" => {
                    event.data["status"].as_str().unwrap_or_default().into()
                }
                Notice::Event(_) => continue,
                Notice::Gap => self.monitor.migration()?.status,
            };
            match status {
                MigrationStatus::Completed => return self.report().map(Some),
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    let why = self.monitor.migration()?.error_desc.unwrap_or_else(|| status.to_string());
                    let said = super::process::quote(&self.running.said());
                    return Err(Failure::Migration(format!("{why}; {said}")));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// The report of a complete migration. QEMU reports the completion shortly before it has added up the
    /// times.
    fn report(&mut self) -> Result<MigrationReport, Failure> {
        let monitor = &self.monitor;
        self.running.until("report", Duration::from_secs(20), |_| {
            let report = monitor.migration()?;
            Ok((report.total_time > Some(0)).then_some(report))
        })
    }

    /// Waits until the guest has arrived, paused.
    fn until_arrived(&mut self) -> Result<(), Failure> {
        let monitor = &self.monitor;
        self.running.until("receive the guest", Duration::from_secs(20), |_| {
            Ok((monitor.status()?.state == RunState::Paused).then_some(()))
        })
    }
}

/// A word of the guest's RAM.
fn word(ram: &File, address: u32) -> Result<u32, Failure> {
    let mut bytes = [0; 4];
    // The file may be shorter until QEMU has set its length.
    match ram.read_exact_at(&mut bytes, address.into()) {
        Ok(()) => Ok(u32::from_le_bytes(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(0),
        Err(error) => Err(Failure::System { doing: "read the guest's RAM".into(), error }),
    }
}

/// Compares RAM. The guest is paused at both ends.
fn compare(way: Way, folder: &Folder) -> Result<(), Failure> {
    let open = |end| File::open(folder.ram(end)).map_err(Failure::system("open the guest's RAM"));
    equal_files(&open("source")?, &open("destination")?, &format!("the memory that {} moved", way.name()))
}

//! The same guest of QEMU, moved by Sterna: `sterna adopt`, `receive --qmp` and `migrate`.

use std::fs::File;
use std::time::{Duration, Instant};

use super::{Ends, Folder, cpu_times, load_bytes};
use crate::peers::compare::equal_files_from;
use crate::peers::cpu::CpuTime;
use crate::peers::failure::Failure;
use crate::peers::migration::{Load, Migration};
use crate::peers::process::Running;
use crate::peers::setup::Setup;
use crate::peers::sterna_runs::Ends as Holders;

/// Moves a guest from one QEMU to another by Sterna, and compares its RAM.
pub(crate) fn migrate_by_sterna(setup: &Setup, transport: &str, load: Load) -> Result<Migration, Failure> {
    let Ends { folder, source, guest_mbps, mut destination } = Ends::start(setup, load)?;
    let qmp = |end: &str| format!("--qmp={}", folder.path(&format!("{end}.sterna")).display());
    let holders = Holders::start(
        setup,
        (&["adopt", "--keep-source", &qmp("source")], "adopted"),
        &["receive", &qmp("destination")],
    )?;

    let of = |running: &Running| CpuTime::of_process(running.id());
    let at_destination = || Ok::<_, Failure>(of(&destination.running)?.and(of(&holders.destination)?));
    let (machine_before, qemus_before) = cpu_times(&source, &destination)?;
    let own_before = qemus_before.and(of(&holders.source)?).and(of(&holders.destination)?);
    let destination_before = at_destination()?;
    let began = Instant::now();
    // A guest that QEMU cannot slow is moved as QEMU moves it: within the downtime, or not at all.
    let how = ["--transport", transport, "--max-rounds=10000"];
    let report = holders.migrate(setup, setup.downtime_ms, &how).map_err(|failure| match failure {
        Failure::Late { .. } => Failure::NotConverged(setup.patience),
        failure => failure,
    })?;
    let wall = began.elapsed();
    let destination_cpu = at_destination()?.since(destination_before);
    let (machine_after, qemus_after) = cpu_times(&source, &destination)?;
    let own_after = qemus_after.and(holders.cpu_after()?);
    destination.running.until("run the guest", Duration::from_secs(20), |_| {
        Ok(destination.monitor.status()?.running.then_some(()))
    })?;
    destination.monitor.stop()?;
    compare(&folder, transport, load)?;
    let number = |name: &str| {
        let lacking = || Failure::Words { what: "sterna migrate".into(), said: report.to_string() };
        report[name].as_f64().ok_or_else(lacking)
    };
    Ok(Migration {
        total_ms: number("total_ms")?,
        wall_ms: wall.as_secs_f64() * 1e3,
        setup_ms: Some(number("setup_ms")?),
        downtime_ms: number("downtime_ms")?,
        moved_mb: number("bytes_sent")? / 1e6,
        machine_cpu: machine_after.since(machine_before),
        own_cpu: own_after.since(own_before),
        destination_cpu: Some(destination_cpu),
        guest_mbps,
        throttle_percent: 0,
    })
}

/// Compares the RAM that the guest does not write at the destination.
fn compare(folder: &Folder, transport: &str, load: Load) -> Result<(), Failure> {
    let open = |end| File::open(folder.ram(end)).map_err(Failure::system("open the guest's RAM"));
    let from = match load {
        Load::Idle => 0,
        Load::Loop => super::boot::loop_end(load_bytes(load)).into(),
    };
    let what = format!("the memory of QEMU that sterna {transport} moved");
    equal_files_from(from, &open("source")?, &open("destination")?, &what)
}

//! The limit of every migration that follows QEMU's stream: QEMU names all pages, and none is sent.

use std::time::{Duration, Instant};

use sterna_qemu::monitor::Monitor;
use sterna_qemu::names::SharedBlock;
use sterna_qemu::qmp::Client;
use sterna_qemu::shared_ram::shared_ram;
use sterna_qemu::source::SourceQemu;
use sterna_qemu::tracker::Naming;

use super::{Folder, Machine};
use crate::peers::failure::Failure;
use crate::peers::migration::Load;
use crate::peers::setup::Setup;

/// How long QEMU takes to write all of an idle guest's RAM to sockets whose reader discards it.
pub(crate) fn time_to_name_all(setup: &Setup) -> Result<Duration, Failure> {
    let folder = Folder::make(setup, Load::Idle)?;
    let mut machine = Machine::start(setup, &folder, "source", &[])?;
    machine.until_touched()?;
    let monitor = Monitor::new(Client::new(folder.path("source.sterna")));
    let ram = shared_ram(&monitor).map_err(failed)?;
    let blocks: Vec<SharedBlock> = ram.into_iter().map(|ram| ram.block).collect();
    let count = blocks.len();
    let qemu = SourceQemu::new(monitor, "idle", blocks, STATE_MAX).map_err(failed)?;
    let began = Instant::now();
    qemu.start().map_err(failed)?;
    loop {
        let naming = qemu.catch_up().map_err(failed)?;
        let tracker = qemu.tracker().map_err(failed)?;
        // As if they were sent at once.
        (0..count).for_each(|block| tracker.pages().take(block, 0..usize::MAX, |_, _| {}));
        if naming != Naming::Partly {
            break;
        }
        if began.elapsed() > setup.patience {
            return Err(Failure::NotEnded(setup.patience));
        }
    }
    let took = began.elapsed();
    qemu.take_back().map_err(failed)?;
    Ok(took)
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Migration(error.to_string())
}

/// The longest state of devices that is read.
const STATE_MAX: u64 = 1 << 30;

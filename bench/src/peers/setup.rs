//! What all measurements share: the device, the command, the limits of a migration.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::arguments::PeersArgs;
use super::device::RdmaDevice;
use super::failure::Failure;

/// The parameters that all measurements share.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// None where only TCP is measured.
    pub(crate) device: Option<RdmaDevice>,
    /// The measured `sterna` command.
    pub(crate) sterna: PathBuf,
    /// The `qemu-system-x86_64` to compare with.
    pub(crate) qemu: PathBuf,
    pub(crate) ram_bytes: u64,
    /// How long a migration may take to converge.
    pub(crate) patience: Duration,
    /// The longest downtime of a guest.
    pub(crate) downtime_ms: u32,
    /// How long a program may take to start.
    pub(crate) start_max: Duration,
    pub(crate) quick: bool,
}

impl Setup {
    pub(crate) fn find(args: &PeersArgs) -> Result<Self, Failure> {
        let sterna = match &args.sterna {
            Some(path) => path.clone(),
            None => beside_this_program()?,
        };
        if !sterna.is_file() {
            return Err(Failure::Sterna(format!(
                "{} is not there: `cargo build --release` makes it, or name another with --sterna",
                sterna.display()
            )));
        }
        Ok(Self {
            device: match args.without_rdma {
                true => None,
                false => Some(RdmaDevice::find(args.device.as_deref())?),
            },
            sterna,
            qemu: args.qemu.clone(),
            ram_bytes: args.memory,
            patience: Duration::from_secs(args.patience),
            downtime_ms: args.downtime_limit,
            start_max: Duration::from_secs(60),
            quick: args.quick,
        })
    }

    pub(crate) fn device(&self) -> Result<&RdmaDevice, Failure> {
        self.device.as_ref().ok_or(Failure::WithoutRdma)
    }

    /// The address of both ends.
    pub(crate) fn address(&self) -> IpAddr {
        self.device.as_ref().map_or(Ipv4Addr::LOCALHOST.into(), |device| device.address)
    }

    /// A folder in memory, removed on drop.
    pub(crate) fn folder(&self, what: &str) -> Result<TempDir, Failure> {
        let memory = Path::new("/dev/shm");
        tempfile::Builder::new()
            .prefix(&format!("sterna-bench-{what}-"))
            .tempdir_in(memory)
            .map_err(Failure::system("make a folder in /dev/shm"))
    }
}

fn beside_this_program() -> Result<PathBuf, Failure> {
    std::env::current_exe()
        .map(|program| program.with_file_name("sterna"))
        .map_err(Failure::system("find this program"))
}

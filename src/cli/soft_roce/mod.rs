//! `sterna soft-roce`: RDMA in software on an ordinary network interface, by the kernel module `rdma_rxe`.
//!
//! `plan` decides from the machine's readings, `system` carries out the decision.

mod plan;
mod status;
mod system;

use std::fmt::Display;
use std::process::ExitCode;

use crate::cli::preflight::{Firewall, Netdev, RdmaDevice, Readings, rdma_devices};
use clap::{Args, Subcommand};

use self::plan::{Facts, Plan, Removal, Step};
use self::status::DeviceStatus;
use super::exit::Exit;
use super::output::{errln, outln};

/// The options of `sterna soft-roce`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SoftRoceArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Make a soft-RoCE device and wait until it is usable; an existing one stays as it is
    Up {
        /// The network interface that faces the other host [default: that of the default route]
        #[arg(long, value_name = "INTERFACE")]
        netdev: Option<String>,
        /// Name for the device
        #[arg(long, default_value = "rxe0", value_parser = device_name)]
        name: String,
    },
    /// Remove a soft-RoCE device
    Down {
        /// The device
        #[arg(long, default_value = "rxe0", value_parser = device_name)]
        name: String,
    },
    /// List the soft-RoCE devices; exit code 1 if none is usable
    Status {
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub(crate) fn run(args: &SoftRoceArgs) -> ExitCode {
    match &args.action {
        Action::Up { netdev, name } => up(netdev.as_deref(), name),
        Action::Down { name } => down(name),
        Action::Status { json } => status(*json),
    }
}

fn up(netdev: Option<&str>, name: &str) -> ExitCode {
    let facts = Facts { readings: Readings::take(), addresses: system::addresses() };
    let name = match plan::up(&facts, netdev, name) {
        Err(refusal) => return say_error(Exit::Refused, &refusal, refusal.remedy(&facts)),
        Ok(Plan::Already { name }) => {
            outln!("{name} is there already");
            name
        }
        Ok(Plan::Make { name, steps }) => {
            if let Err(exit) = make(&facts, &steps) {
                return exit;
            }
            name
        }
    };
    match system::wait_until_ready(&name) {
        Ok(device) => {
            describe(&device);
            Exit::Done.into()
        }
        Err(error) => say_error(Exit::Failed, &error, error.remedy(&facts)),
    }
}

fn make(facts: &Facts, steps: &[Step]) -> Result<(), ExitCode> {
    for step in steps {
        system::execute(step)
            .map_err(|error| say_error(Exit::Failed, &error, plan::remedy_of_failed(step, facts)))?;
        outln!("{step}");
    }
    Ok(())
}

/// Prints the device's properties and advice for its user.
fn describe(device: &RdmaDevice) {
    // Read again: the device did not exist before.
    let readings = Readings::take();
    let status = DeviceStatus::of(device, &readings.network);
    outln!("{status}");
    for note in notes(&readings, readings.network.netdev(&status.netdev)) {
        outln!("note: {note}");
    }
}

fn notes(readings: &Readings, netdev: Option<&Netdev>) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(netdev) = netdev.filter(|netdev| netdev.roce_mtu_bytes() < 4096) {
        let command = readings.platform.as_root(&format!("ip link set dev {} mtu 9000", netdev.name));
        notes.push(format!(
            "packets of {} bytes; 4096 need an MTU of 4200 or more at both hosts and on the way: {command}",
            netdev.roce_mtu_bytes()
        ));
    }
    let open = match readings.network.firewall.map(Firewall::open_roce_port) {
        Some(command) => format!(": {}", readings.platform.as_root(command)),
        None => String::new(),
    };
    notes.push(format!("it receives on UDP port 4791, which firewalls must let pass{open}"));
    notes.push(
        "what it sends is neither encrypted nor authenticated: for tests, or for a link that nobody else can reach".to_owned(),
    );
    notes
}

fn down(name: &str) -> ExitCode {
    let facts = Facts { readings: Readings::take(), addresses: None };
    let removal = plan::down(&facts, name, system::holders);
    match removal {
        Err(refusal) => say_error(Exit::Refused, &refusal, refusal.remedy(&facts)),
        Ok(Removal::NotThere) => {
            outln!("there is no device {name}; `sterna soft-roce status` lists those there are");
            Exit::Done.into()
        }
        Ok(Removal::Remove(step)) => match system::execute(&step) {
            Ok(()) => {
                outln!("{step}");
                Exit::Done.into()
            }
            Err(error) => say_error(Exit::Failed, &error, plan::remedy_of_failed(&step, &facts)),
        },
    }
}

fn status(json: bool) -> ExitCode {
    let readings = Readings::take();
    let devices: Vec<DeviceStatus> = rdma_devices()
        .iter()
        .filter(|device| device.soft_roce_on.is_some())
        .map(|device| DeviceStatus::of(device, &readings.network))
        .collect();
    if json {
        outln!("{}", serde_json::json!({ "devices": devices }));
    } else if devices.is_empty() {
        outln!("no soft-RoCE device; to make one: {}", readings.platform.as_root("sterna soft-roce up"));
    } else {
        devices.iter().for_each(|device| outln!("{device}"));
    }
    ExitCode::from(u8::from(!devices.iter().any(|device| device.ready)))
}

fn say_error(exit: Exit, error: &dyn Display, remedy: Option<String>) -> ExitCode {
    errln!("error: {error}");
    if let Some(remedy) = remedy {
        errln!("mend: {remedy}");
    }
    exit.into()
}

/// The kernel's rule for device names (`IB_DEVICE_NAME_MAX`, no `%`), without characters that a file name
/// cannot have.
fn device_name(text: &str) -> Result<String, String> {
    let fits = (1..64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    if fits && !text.starts_with(['-', '.']) {
        Ok(text.to_owned())
    } else {
        Err("a device name has 1 to 63 letters, digits, '_', '-' or '.', and begins with none of the last two".to_owned())
    }
}

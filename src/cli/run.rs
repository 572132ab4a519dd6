//! `sterna run`: starts a guest and holds it.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use sterna::host;
use sterna::lock::Lock;
use sterna::state::GuestClaim;
use sterna::transport::rdma::RdmaProvider;
use sterna_vmm::{HugePageSize, MachineConfig, MachineError, MachineKind, Workload};

use super::dirty_log::DirtyLogArgs;
use super::exit::Exit;
use super::machine::MachineGuest;
use super::output::{self, errln, outln};
use super::server::Server;
use super::size::Size;
use super::socket::{self, Listener};
use super::state::StateArgs;
use super::vm_process::{StdinArgs, hold};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The guest's name, by which `sterna migrate` finds it
    #[arg(default_value = "guest", value_parser = socket::parse_name)]
    name: String,
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Start a new guest although one of this name was given to another host: your word that this is another
    /// guest. It replaces this host's records of the name
    #[arg(long)]
    new: bool,
    /// Run the guest only while this file is locked: an arbiter between the hosts, on storage that they share
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Print events as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    stdin: StdinArgs,
}

/// The parts of a guest.
#[derive(Clone, Debug, Args)]
pub(crate) struct GuestArgs {
    /// RAM of the guest
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub(crate) memory: Size,
    /// Virtual processors of the guest
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: u8,
    /// How much memory the guest writes over and over [default: all that it can]
    #[arg(long, value_name = "SIZE")]
    pub(crate) working_set: Option<Size>,
    /// How fast the guest writes, in MB/s; 0 is an idle guest
    #[arg(long, default_value_t = 25, value_name = "MB/S")]
    pub(crate) dirty_rate: u64,
    /// Back the RAM with huge pages
    #[arg(long, value_enum, value_name = "SIZE")]
    pub(crate) hugepages: Option<HugePages>,
    /// The kind of machine
    #[arg(long, value_enum, default_value_t)]
    pub(crate) machine: MachineChoice,
    /// Give the guest a device with this much state to save and load, for tests and benchmarks
    #[arg(long, default_value = "0", value_name = "SIZE", hide = true)]
    pub(crate) device_state: Size,
    /// Have only this many processors write the working set, and each other one a single page, for tests and
    /// benchmarks; 0 is all
    #[arg(long, default_value_t = 0, value_name = "N", hide = true)]
    pub(crate) sweepers: u8,
    #[command(flatten)]
    pub(crate) dirty_log: DirtyLogArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum HugePages {
    /// 2 MiB
    #[value(name = "2M")]
    TwoMiB,
    /// 1 GiB
    #[value(name = "1G")]
    OneGiB,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MachineChoice {
    /// KVM where it can be used, else the synthetic guest
    #[default]
    Auto,
    /// A real guest on KVM
    Kvm,
    /// Threads that behave like the guest, for hosts without KVM
    Synthetic,
}

impl GuestArgs {
    pub(crate) fn config(&self) -> MachineConfig {
        let memory_bytes = self.memory.0;
        let largest = Workload::largest_bytes(memory_bytes);
        MachineConfig {
            memory_bytes,
            vcpus: self.cpus,
            hugepages: self.hugepages.map(|size| match size {
                HugePages::TwoMiB => HugePageSize::TwoMiB,
                HugePages::OneGiB => HugePageSize::OneGiB,
            }),
            workload: Workload {
                working_set_bytes: self.working_set.map_or(largest, |size| size.0),
                rate_mb_per_s: self.dirty_rate,
                prefill: true,
                sweepers: self.sweepers,
            },
        }
    }
}

impl MachineChoice {
    /// The kind to make on this host, and a note to print about it.
    pub(crate) fn decide(self) -> (MachineKind, Option<String>) {
        match self {
            Self::Kvm => (MachineKind::Kvm, None),
            Self::Synthetic => (MachineKind::Synthetic, None),
            Self::Auto => match host::kvm_access() {
                host::KvmAccess::Usable => (MachineKind::Kvm, None),
                unusable => (
                    MachineKind::Synthetic,
                    Some(format!("no KVM guest, a synthetic one instead: {unusable}")),
                ),
            },
        }
    }

    /// The kind's word on the command line.
    pub(crate) fn word(kind: MachineKind) -> &'static str {
        match kind {
            MachineKind::Kvm => "kvm",
            MachineKind::Synthetic => "synthetic",
        }
    }
}

pub(crate) fn run(args: &RunArgs) -> ExitCode {
    args.stdin.heed();
    let state = match args.state.state() {
        Ok(state) => state,
        Err(error) => return output::error(Exit::Refused, error),
    };
    let claim = match state.start(&args.name, args.new) {
        Ok(claim) => claim,
        Err(error) => return output::coded(Exit::Refused, error.code(), error),
    };
    run_claimed(args, &claim).unwrap_or_else(|(exit, error)| {
        // No guest was started.
        claim.retire();
        output::error(exit, error)
    })
}

fn run_claimed(args: &RunArgs, claim: &GuestClaim) -> Result<ExitCode, (Exit, String)> {
    let refused = |error: &dyn Display| (Exit::Refused, error.to_string());
    let lock = args.lock.as_ref().map(Lock::at);
    lock.as_ref().map_or(Ok(()), Lock::take).map_err(|error| refused(&error))?;
    let socket = Listener::bind(&args.name).map_err(|error| refused(&error))?;
    RdmaProvider::load_ahead();
    let (kind, note) = args.guest.machine.decide();
    if let Some(note) = note {
        errln!("note: {note}");
    }
    let made = args.guest.dirty_log.new_machine(kind, args.guest.config());
    let machine =
        made.and_then(|machine| machine.start().map(|()| machine)).map_err(|error| match error {
            MachineError::Config(_) => (Exit::Usage, error.to_string()),
            error => refused(&error),
        })?;
    let name = args.name.clone();
    let guest = MachineGuest::new(name.clone(), machine, Server::new(socket))
        .with_device_state(args.guest.device_state.0);
    guest.rehearse().map_err(|error| (Exit::Failed, error.to_string()))?;
    if args.json {
        outln!(
            "{}",
            serde_json::json!({ "event": "running", "name": name, "machine": MachineChoice::word(kind) })
        );
    } else {
        outln!("{name} runs here. To move it: sterna migrate {name} --to HOST");
    }
    let ended = hold(Box::new(guest), claim.clone(), lock);
    ended.say(&name, args.json);
    Ok(Exit::Done.into())
}

//! `sterna demo`: a guest moves between two real processes of this machine, and the demo checks everything
//! about it.

mod processes;

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use sterna::progress::Report;
use sterna_vmm::MachineKind;

use self::processes::{Holders, start_receiver, start_runner};
use super::exit::Exit;
use super::lanes::Transport;
use super::migrate::{MoveArgs, VerifyChoice, move_guest};
use super::output::{self, errln, outln};
use super::protocol::{Answer, Checked, Failure, Request, Status};
use super::run::{GuestArgs, MachineChoice};
use super::size::Size;
use super::socket::ask;

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    how: MoveArgs,
    /// Address of this machine over which to move [default: the RDMA device's, or loopback]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// How much of the guest's memory both ends compare; `off` shows the downtime as it is in production
    #[arg(long, value_enum, value_name = "HOW", default_value_t = VerifyChoice::Full)]
    verify: VerifyChoice,
    /// Print the report as one JSON object, as the last line
    #[arg(long)]
    json: bool,
}

/// The guest as the demo saw it, before and after.
struct Seen {
    report: Report,
    before: Status,
    after: Status,
    checked: Checked,
    source_ended: bool,
}

pub(crate) fn run(args: &DemoArgs) -> ExitCode {
    let (kind, note) = args.guest.machine.decide();
    if let Some(note) = note {
        errln!("note: {note}");
    }
    let json = args.json;
    match demonstrate(args, kind) {
        Ok(seen) => conclude(&seen, kind, json),
        Err(failure) => {
            let code = output::failed(&failure);
            if json {
                outln!("{}", output::json_failure(&failure));
            }
            code
        }
    }
}

fn demonstrate(args: &DemoArgs, kind: MachineKind) -> Result<Seen, Failure> {
    let address = args.address.unwrap_or_else(|| default_address(args.how.lanes.transport));
    let mut holders = Holders::new()?;
    let how = MoveArgs { security: holders.trust(&args.how.security)?, ..args.how.clone() };
    let to = start_receiver(&mut holders, address, &how.security)?;
    errln!("destination: process {} listens at {to}", holders.destination_id());
    start_runner(&mut holders, &args.guest, kind)?;
    let (source, destination) = (holders.source_name(), holders.destination_name());
    let before = wait_until_at_work(&source)?;
    errln!(
        "source: process {} runs a {} guest, {} of RAM, {} vCPU{}, writing {} MB/s",
        holders.source_id(),
        if kind == MachineKind::Kvm { "KVM" } else { "synthetic" },
        Size(before.vitals.memory_bytes),
        before.vitals.vcpus,
        if before.vitals.vcpus == 1 { "" } else { "s" },
        args.guest.dirty_rate,
    );
    how.security.trust.warn();
    let request = how.request(to, args.verify).map_err(local)?;
    let report = move_guest(&source, request, &mut output::progress)?;
    let source_ended = holders.source_has_ended(Duration::from_secs(20));
    errln!("  the guest checks its own memory at the destination ...");
    let checked = match ask(&destination, &Request::Check).map_err(|error| arrived(error.to_string()))? {
        Answer::Checked(checked) => checked,
        Answer::Failed(failure) => return Err(failure),
        other => return Err(arrived(format!("the destination answered {other:?} to a check"))),
    };
    let after = wait_for_beats(&destination, before.vitals.heartbeats)?;
    Ok(Seen { report, before, after, checked, source_ended })
}

/// Judges the result, and prints it.
fn conclude(seen: &Seen, kind: MachineKind, json: bool) -> ExitCode {
    let Seen { report, before, after, checked, source_ended } = seen;
    let mut wrong = Vec::new();
    if checked.wrong > 0 {
        wrong.push(format!("the guest finds {} of its pages wrong", checked.wrong));
    }
    if after.vitals.heartbeat_regressions > 0 {
        wrong.push("the guest's heartbeat went back or skipped".to_owned());
    }
    if after.vitals.heartbeats <= before.vitals.heartbeats {
        wrong.push("the guest's heartbeat does not go on at the destination".to_owned());
    }
    if !source_ended {
        wrong.push("the source's process has not ended".to_owned());
    }
    let mut lines = output::summary(report);
    lines.push((
        "checked",
        format!("{} pages by the guest itself afterwards, {} wrong", checked.pages, checked.wrong),
    ));
    lines.push((
        "heartbeat",
        format!(
            "{} before, {} after, none lost or repeated",
            before.vitals.heartbeats, after.vitals.heartbeats
        ),
    ));
    lines.push(("source", "its process has ended and runs the guest no more".into()));
    if wrong.is_empty() {
        outln!("The guest moved, and kept running. ({} guest)", MachineChoice::word(kind));
        output::print_lines(&lines);
    }
    for what in &wrong {
        errln!("error: {what}");
    }
    if json {
        let mut object = output::json(report, checked.wrong);
        object.insert("machine".into(), MachineChoice::word(kind).into());
        object.insert("checked_pages".into(), checked.pages.into());
        object.insert("heartbeats_before".into(), before.vitals.heartbeats.into());
        object.insert("heartbeats_after".into(), after.vitals.heartbeats.into());
        if !wrong.is_empty() {
            object.insert("status".into(), "failed".into());
            object.insert("error".into(), wrong.join("; ").into());
        }
        outln!("{}", serde_json::Value::Object(object));
    }
    if wrong.is_empty() { Exit::Done.into() } else { Exit::Lost.into() }
}

/// The RDMA device's address where RDMA is allowed, else loopback.
fn default_address(transport: Transport) -> IpAddr {
    let device = match transport {
        Transport::Tcp => None,
        Transport::Auto | Transport::Rdma => sterna::transport::rdma::RdmaPath::any_address(),
    };
    device.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// Waits until the guest beats and has written all of its working set, so that the migration has real
/// content.
fn wait_until_at_work(name: &str) -> Result<Status, Failure> {
    wait_for(name, "the guest does not start", |status| {
        status.vitals.heartbeats >= 3 && status.vitals.passes >= 1
    })
}

/// Waits until the guest has beaten twice more.
fn wait_for_beats(name: &str, before: u64) -> Result<Status, Failure> {
    let first = wait_for(name, "the guest does not go on", |status| status.vitals.heartbeats > before)?;
    wait_for(name, "the guest does not go on", |status| {
        status.vitals.heartbeats > first.vitals.heartbeats + 2
    })
}

fn wait_for(name: &str, otherwise: &str, enough: impl Fn(&Status) -> bool) -> Result<Status, Failure> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let status = match ask(name, &Request::Status) {
            Ok(Answer::Status(status)) => status,
            Ok(other) => return Err(local(format!("asked for its status, {name} said {other:?}"))),
            Err(error) => return Err(local(error.to_string())),
        };
        if enough(&status) {
            return Ok(status);
        }
        if status.vitals.phase != "running" || Instant::now() > deadline {
            return Err(local(format!("{otherwise}: it is {}", status.vitals.phase)));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn local(what: String) -> Failure {
    Failure {
        exit: Exit::Failed,
        what,
        guest: "the guest was the demo's own and ends with it".into(),
        code: None,
    }
}

fn arrived(what: String) -> Failure {
    Failure {
        exit: Exit::Lost,
        what,
        guest: "the guest is at the destination, and not as it should be".into(),
        code: None,
    }
}

/// For the tests of the demo's judgement.
#[cfg(test)]
mod tests {
    use sterna::convergence::Limits;
    use sterna::progress::DowntimeReport;
    use sterna::source::Verify;

    use super::super::protocol::{GuestKind, Vitals};
    use super::*;

    #[test]
    fn a_wrong_page_or_a_lost_beat_is_not_a_success() {
        let status = |heartbeats, heartbeat_regressions| Status {
            name: "tern".into(),
            vitals: Vitals {
                write_limit_pages_per_second: None,
                kind: GuestKind::Synthetic,
                phase: "running".into(),
                memory_bytes: 16 << 20,
                vcpus: 1,
                heartbeats,
                heartbeat_regressions,
                passes: 1,
                throttle_percent: 0,
            },
            migrating: false,
            in_doubt: false,
            insecure: false,
        };
        let report = Report {
            fell_back: None,
            transport: "tcp".into(),
            total_ms: 1.0,
            setup_ms: 1.0,
            first_byte_ms: Some(1.0),
            downtime_ms: 1.0,
            verify_ms: 0.0,
            guest_downtime_ms: None,
            lost_ms: 0.0,
            lost_to_throttling_ms: 0.0,
            lost_to_tracking_ms: None,
            predicted: Some(DowntimeReport::default()),
            measured: DowntimeReport::default(),
            heartbeats_per_second: None,
            limits: Limits::default(),
            rounds: Vec::new(),
            bytes_sent: 0,
            pages_sent: 0,
            pages_zero: 0,
            throughput_mbps: 0.0,
            verify: Verify::Off,
            verified_pages: 0,
            blocks_hashed_running: 0,
            blocks_hashed_paused: 0,
        };
        let good = || Seen {
            report: report.clone(),
            before: status(5, 0),
            after: status(9, 0),
            checked: Checked { pages: 7, wrong: 0 },
            source_ended: true,
        };
        let code = |seen: Seen| format!("{:?}", conclude(&seen, MachineKind::Synthetic, false));
        let (done, lost) = (format!("{:?}", ExitCode::from(0)), format!("{:?}", ExitCode::from(13)));
        assert_eq!(code(good()), done);
        assert_eq!(code(Seen { checked: Checked { pages: 7, wrong: 1 }, ..good() }), lost);
        assert_eq!(code(Seen { after: status(9, 1), ..good() }), lost);
        assert_eq!(code(Seen { after: status(5, 0), ..good() }), lost);
        assert_eq!(code(Seen { source_ended: false, ..good() }), lost);
    }
}

//! Output: errors in three lines, progress on stderr, results on stdout.

pub(crate) mod streams;

use std::fmt::{Display, Write};
use std::process::ExitCode;

use sterna::error_code::ErrorCode;
use sterna::progress::{DowntimeReport, Event, Report, RoundReport};
use sterna::source::Verify;

use super::exit::Exit;
use super::hints::hint;
use super::limits;
use super::protocol::Failure;
use super::size::Size;

pub(crate) use streams::{Log, errln, flush, never_wait, outln};

/// Prints what failed and, where a guest is concerned, where it is; returns the exit code.
pub(crate) fn failed(failure: &Failure) -> ExitCode {
    errln!("error: {}", failure.what);
    errln!("where: {}", failure.guest);
    help(failure.code.as_deref());
    failure.exit.into()
}

/// Prints an error of the library that concerns no guest.
pub(crate) fn coded(exit: Exit, code: ErrorCode, what: impl Display) -> ExitCode {
    errln!("error: {what}");
    help(Some(&code.to_string()));
    exit.into()
}

/// Prints the code of an error, and its remedy.
pub(crate) fn help(code: Option<&str>) {
    let Some(code) = code else { return };
    if let Some(hint) = hint(code) {
        errln!("help:  {hint}");
    }
    errln!("code:  {code}");
}

/// Prints an error that concerns no guest.
pub(crate) fn error(exit: Exit, what: impl Display) -> ExitCode {
    errln!("error: {what}");
    exit.into()
}

/// Shows an event of a migration, a line each.
pub(crate) fn progress(event: &Event) {
    match event {
        Event::Connected { transport, via, total_pages } => {
            errln!("  {} of RAM over {}: {via}", Size(total_pages * 4096), transport_name(transport));
        }
        Event::FellBack { from, to, why } => {
            errln!("  {} failed, going on over {}: {why}", transport_name(from), transport_name(to));
        }
        Event::Round { number, round, predicted_downtime_ms } => {
            let rest = if round.dirty_rate_mbps > 0.0 {
                let wrote = format!(", guest wrote {:.0} MB/s", round.dirty_rate_mbps);
                match predicted_downtime_ms {
                    Some(ms) => format!("{wrote}; switching now would take {ms:.0} ms"),
                    None => wrote,
                }
            } else {
                String::new()
            };
            errln!(
                "  round {number}: {} pages, {} in {:.0} ms{}{}{rest}",
                round.pages,
                Size(round.bytes),
                round.ms,
                lost_meanwhile(round),
                waiting(round)
            );
        }
        Event::Throttled { percent: 0, .. } => errln!("  guest at full speed again"),
        Event::Throttled { percent, write_limit_mbps: Some(mbps) } => {
            errln!(
                "  rounds do not get smaller: guest's writes limited to {mbps:.1} MB/s, {percent} % less than at \
                 full speed"
            );
        }
        Event::Throttled { percent, write_limit_mbps: None } => {
            errln!("  rounds do not get smaller: guest slowed by {percent} %");
        }
        Event::CourseChosen { taken, not_taken } => {
            let taken = taken.as_deref().unwrap_or("none is open");
            errln!("  course: {taken}; not taken: {}", not_taken.join("; "));
        }
        Event::NotConverging { why, help, .. } => {
            errln!("  warning: {why}; it would take {help}");
        }
        Event::LogWarning { why } => errln!("  warning: {why}"),
        Event::Relaxed { downtime_limit_ms } => {
            errln!("  rounds do not get smaller: {downtime_limit_ms:.0} ms of downtime allowed");
        }
        Event::LimitsChanged(changed) => errln!("  limits changed: {}", limits::line(changed)),
        Event::Stopping { predicted_downtime_ms } => {
            let unknown = "that nobody knows".to_owned();
            let downtime = predicted_downtime_ms.map_or(unknown, |ms| format!("of about {ms:.0} ms"));
            errln!("  switching all the same, with a downtime {downtime}");
        }
        Event::Hashed { blocks, of, ms } => {
            errln!("  {blocks} of {of} blocks hashed at both ends in {ms:.0} ms, while the guest runs");
        }
        Event::Paused => errln!("  guest paused for the switch"),
        Event::Asking { why } => errln!("  {why}; asking the destination what became of the guest"),
        Event::Switched { downtime_ms } => {
            errln!("  guest runs at the destination after {downtime_ms:.0} ms");
        }
        _ => {}
    }
}

/// The summary of a migration for people, as lines of a label and a text.
pub(crate) fn summary(report: &Report) -> Vec<(&'static str, String)> {
    let mut downtime = format!("{:.1} ms", report.downtime_ms - report.verify_ms);
    if report.verified_pages > 0 {
        let _ = write!(downtime, ", and {:.1} ms more to compare", report.verify_ms);
    }
    if let Some(ms) = report.guest_downtime_ms {
        let _ = write!(downtime, "; {ms:.1} ms by the guest's own heartbeat");
    }
    let mut lines = vec![
        ("transport", transport(report)),
        ("total time", format!("{:.0} ms, {:.0} ms of it to set up", report.total_ms, report.setup_ms)),
        ("downtime", downtime),
        ("of that", parts(report)),
        ("guest lost", lost(report)),
        ("rounds", report.rounds.len().to_string()),
        (
            "moved",
            format!(
                "{} in {} pages at {:.0} MB/s; {} zero pages not sent",
                Size(report.bytes_sent),
                report.pages_sent,
                report.throughput_mbps,
                report.pages_zero
            ),
        ),
    ];
    if report.verified_pages > 0 {
        lines.push(("compared", compared(report)));
    }
    lines
}

/// What the guest lost in a round, if that is known and not nothing.
fn lost_meanwhile(round: &RoundReport) -> String {
    let lost_ms = round.lost_to_throttling_ms + round.lost_to_tracking_ms.unwrap_or(0.0);
    if lost_ms < 0.5 { String::new() } else { format!(", {lost_ms:.0} ms lost to the guest") }
}

/// How many pages are left for the last round, if any is.
fn waiting(round: &RoundReport) -> String {
    match round.waiting_pages {
        0 => String::new(),
        pages => format!(", {pages} hot pages wait for the last round"),
    }
}

/// What the guest lost in all, by cause.
fn lost(report: &Report) -> String {
    let Report { lost_ms, downtime_ms, lost_to_throttling_ms, lost_to_tracking_ms, .. } = report;
    let tracking = match lost_to_tracking_ms {
        Some(ms) => format!("{ms:.1} recording its writes"),
        None => "recording its writes unknown".to_owned(),
    };
    format!("{lost_ms:.1} ms: downtime {downtime_ms:.1}, throttling {lost_to_throttling_ms:.1}, {tracking}")
}

fn compared(report: &Report) -> String {
    let Report { verified_pages, blocks_hashed_running, blocks_hashed_paused, .. } = report;
    let all = blocks_hashed_running + blocks_hashed_paused;
    match report.verify {
        Verify::Final => format!(
            "{verified_pages} pages, all equal: {blocks_hashed_running} of {all} blocks while the guest ran"
        ),
        _ => format!("{verified_pages} pages at the switch, all equal"),
    }
}

/// The parts of the downtime, and their predictions.
fn parts(report: &Report) -> String {
    let DowntimeReport { pause_ms, save_ms, harvest_ms, send_ms, revoke_ms, load_ms, .. } = report.measured;
    let rest_ms = report.measured.transfer_ms + report.measured.start_ms;
    let predicted = report
        .predicted
        .map_or_else(String::new, |predicted| format!("; {:.1} ms were predicted", predicted.total_ms));
    let register = match report.measured.register_ms {
        0.0 => String::new(),
        register_ms => format!("register {register_ms:.1}, "),
    };
    format!(
        "pause {pause_ms:.1}, save {save_ms:.1}, harvest {harvest_ms:.1}, {register}send {send_ms:.1}, \
         revoke {revoke_ms:.1}, \
         load {load_ms:.1}, messages and start {rest_ms:.1} ms{predicted}"
    )
}

/// Prints lines of a label and a text, aligned.
pub(crate) fn print_lines(lines: &[(&'static str, String)]) {
    for (label, text) in lines {
        outln!("  {label:<12} {text}");
    }
}

/// A report as the JSON object that `--json` promises; `wrong_pages` counts the findings of all checks.
pub(crate) fn json(report: &Report, wrong_pages: u64) -> serde_json::Map<String, serde_json::Value> {
    let object = serde_json::json!({
        "status": "completed",
        "transport": report.transport,
        "fell_back": report.fell_back,
        "total_ms": report.total_ms,
        "setup_ms": report.setup_ms,
        "first_byte_ms": report.first_byte_ms,
        "downtime_ms": report.downtime_ms,
        "verify": report.verify,
        "verify_ms": report.verify_ms,
        "guest_downtime_ms": report.guest_downtime_ms,
        "lost": {
            "total_ms": report.lost_ms,
            "downtime_ms": report.downtime_ms,
            "throttling_ms": report.lost_to_throttling_ms,
            "tracking_ms": report.lost_to_tracking_ms,
        },
        "predicted_downtime_ms": report.predicted.map(|predicted| predicted.total_ms),
        "downtime_predicted": report.predicted,
        "downtime_measured": report.measured,
        "heartbeats_per_second": report.heartbeats_per_second,
        "limits": report.limits,
        "rounds": report.rounds.len(),
        "bytes_sent": report.bytes_sent,
        "pages_sent": report.pages_sent,
        "pages_zero": report.pages_zero,
        "throughput_mbps": report.throughput_mbps,
        "verified_pages": report.verified_pages,
        "blocks_hashed_running": report.blocks_hashed_running,
        "blocks_hashed_paused": report.blocks_hashed_paused,
        "wrong_pages": wrong_pages,
        "per_round": report.rounds,
    });
    match object {
        serde_json::Value::Object(object) => object,
        _ => serde_json::Map::new(),
    }
}

fn transport(report: &Report) -> String {
    let name = transport_name(&report.transport);
    match &report.fell_back {
        None => name,
        Some(why) => format!("{name}, after the lanes before failed: {why}"),
    }
}

/// A failure as a JSON object.
pub(crate) fn json_failure(failure: &Failure) -> serde_json::Value {
    serde_json::json!({
        "status": "failed",
        "error": failure.what,
        "code": failure.code,
        "guest": failure.guest,
        "exit": failure.exit,
    })
}

/// A transport's name as people write it.
pub(crate) fn transport_name(scheme: &str) -> String {
    scheme.to_uppercase()
}

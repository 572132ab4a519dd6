//! `sterna send`: moves a file to a host that runs `sterna receive --into`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{ExitCode, exit};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use sterna::image::SessionError;
use sterna::image::{self, Options, Phase, Progress, Report, SendError, SendFailure};
use sterna::source::Cancel;

use super::exit::Exit;
use super::lanes::LaneArgs;
use super::output::{self, errln, help, outln, print_lines, transport_name};
use super::port::with_port;
use super::security::SecurityArgs;
use super::size::Size;

/// For `--help`.
const HELP: &str = "\
What was cut is resumed by the same command: only what is missing or different travels.
Exit codes say where the data is:
    0  stored at the destination, its digest compared there
    2  wrong usage
   10  failed part-way; what arrived is kept at the destination
   11  refused before anything was sent
  130  cancelled (143 by SIGTERM); what arrived is kept at the destination";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct SendArgs {
    /// The file: a memory image, or any other, also on hugetlbfs or in /dev/shm. No process may write to it
    /// meanwhile
    file: PathBuf,
    /// Destination: a host on which `sterna receive --into PATH` runs
    #[arg(long, value_name = "HOST[:PORT]")]
    to: String,
    #[command(flatten)]
    lanes: LaneArgs,
    #[command(flatten)]
    security: SecurityArgs,
    /// Print the report as one JSON object, as the last line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &SendArgs) -> ExitCode {
    args.security.trust.warn();
    let security = args.lanes.check(&args.security).and_then(|()| args.security.security());
    let security = match security {
        Ok(security) => security,
        Err(error) => return output::error(Exit::Usage, error),
    };
    let (transports, lanes) = (args.lanes.transports(&args.security), args.lanes.lanes);
    let options = Options { transports, lanes, security, cancel: Cancel::default() };
    let signal = cancel_on_signal(&options.cancel);
    let progress = Progress::default();
    let result = thread::scope(|scope| {
        let (ended, end) = channel::<()>();
        let progress = &progress;
        scope.spawn(move || show(progress, &end));
        let result = image::send(&args.file, &with_port(&args.to), &options, progress);
        drop(ended);
        result
    });
    match result {
        Ok(report) => {
            outln!("{} is stored at {}", args.file.display(), args.to);
            print_lines(&summary(&report));
            if args.json {
                outln!("{}", json_report(&report));
            }
            Exit::Done.into()
        }
        Err(error) => {
            fail(args, &error, progress.phase() == Phase::Verifying, signal.load(Ordering::Relaxed))
        }
    }
}

fn fail(args: &SendArgs, error: &SendError, verifying: bool, signal: i32) -> ExitCode {
    let exit = match error.cause {
        SendFailure::Transfer(SessionError::Cancelled) if signal == SIGTERM => Exit::Terminated,
        SendFailure::Transfer(SessionError::Cancelled) => Exit::Cancelled,
        _ if error.refused => Exit::Refused,
        _ => Exit::Failed,
    };
    let data = if error.refused {
        "nothing was sent; the file is as it was".to_owned()
    } else if verifying {
        format!(
            "perhaps stored at the destination already; if it is not there, this sends the rest: sterna send {} --to {}",
            args.file.display(),
            args.to
        )
    } else {
        format!(
            "what arrived is kept at the destination; this sends the rest: sterna send {} --to {}",
            args.file.display(),
            args.to
        )
    };
    errln!("error: {error}");
    errln!("where: {data}");
    let code = error.cause.code().to_string();
    help(Some(&code));
    if args.json {
        outln!(
            "{}",
            json!({ "status": "failed", "error": error.to_string(), "code": code, "data": data, "exit": exit })
        );
    }
    exit.into()
}

fn summary(report: &Report) -> Vec<(&'static str, String)> {
    let transport = report.transport.as_deref().map_or_else(|| "none".into(), transport_name);
    let mut sent = format!("{} at {:.0} MB/s", Size(report.bytes_sent), report.throughput_mbps);
    if report.bytes_resumed > 0 {
        sent += &format!("; {} were there already", Size(report.bytes_resumed));
    }
    vec![
        ("transport", format!("{transport}: {}", report.via)),
        ("total time", format!("{:.0} ms, {:.0} ms of it to set up", report.total_ms, report.setup_ms)),
        ("file", format!("{}, {} of it data", Size(report.file_bytes), Size(report.data_bytes))),
        ("sent", sent),
        ("digest", format!("{}, the same at both ends", report.digest)),
    ]
}

fn json_report(report: &Report) -> serde_json::Value {
    json!({
        "status": "stored",
        "transport": report.transport,
        "file_bytes": report.file_bytes,
        "data_bytes": report.data_bytes,
        "bytes_sent": report.bytes_sent,
        "bytes_resumed": report.bytes_resumed,
        "total_ms": report.total_ms,
        "setup_ms": report.setup_ms,
        "throughput_mbps": report.throughput_mbps,
        "digest": report.digest.to_string(),
        "verified": true,
    })
}

/// On Ctrl-C or SIGTERM asks for the end. Returns the signal.
fn cancel_on_signal(cancel: &Cancel) -> Arc<AtomicI32> {
    let signal = Arc::new(AtomicI32::new(0));
    match Signals::new([SIGINT, SIGTERM]) {
        Ok(mut signals) => {
            let (cancel, signal) = (cancel.clone(), signal.clone());
            thread::spawn(move || {
                let Some(came) = signals.forever().next() else { return };
                signal.store(came, Ordering::Relaxed);
                cancel.cancel();
                // The transfer may be waiting for a slow answer. Leaving loses nothing: the destination keeps
                // the data that it has.
                thread::sleep(HEED_MAX);
                errln!("error: cancelled\nwhere: what arrived is kept at the destination");
                exit(128 + came);
            });
        }
        Err(error) => tracing::warn!("signals cannot be caught, so they end this at once: {error}"),
    }
    signal
}

/// How long the transfer may take to obey a signal.
const HEED_MAX: Duration = Duration::from_secs(2);

/// The interval of progress lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// Shows the progress on stderr, until the other end of `end` is dropped.
fn show(progress: &Progress, end: &Receiver<()>) {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = "  {msg:10} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta}";
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(0).with_style(style.progress_chars("=> "))
    });
    let mut last_line = Instant::now();
    while end.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
        let (done, total) = (progress.done_bytes(), progress.total_bytes());
        let doing = match progress.phase() {
            Phase::Connecting => "connecting",
            Phase::Comparing => "comparing",
            Phase::Sending => "sending",
            Phase::Verifying => "verifying",
        };
        if let Some(bar) = &bar {
            bar.update(|state| {
                state.set_len(total);
                state.set_pos(done);
            });
            bar.set_message(doing);
        } else if last_line.elapsed() >= LINE_EVERY {
            last_line = Instant::now();
            errln!("  {doing}: {} of {}", Size(done), Size(total));
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

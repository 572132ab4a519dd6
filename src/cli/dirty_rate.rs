//! `sterna dirty-rate`: how fast a guest writes its memory, and whether and how it would move.

use std::process::ExitCode;

use clap::Args;
use sterna::convergence::{Decision, Forecast, Limits};

use super::exit::Exit;
use super::limits::LimitArgs;
use super::output::{self, outln};
use super::protocol::{Answer, Request, Samples};
use super::size::Size;
use super::socket::{self, ask};

#[derive(Debug, Args)]
pub(crate) struct DirtyRateArgs {
    /// Name of the guest
    #[arg(value_parser = socket::parse_name)]
    name: String,
    /// The link's throughput, in MB/s; may be given more than once [default: 110, 1100, 2800, 11000]
    #[arg(long, value_name = "MB/S", value_parser = clap::value_parser!(u64).range(1..))]
    bandwidth: Vec<u64>,
    /// Longest interval of sampling, after shorter ones, in ms
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(16..=60_000))]
    interval: u64,
    #[command(flatten)]
    limits: LimitArgs,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

/// Links of 1, 10, 25 and 100 Gb/s, counting pages only.
const LINKS_MBPS: [u64; 4] = [110, 1100, 2800, 11_000];

pub(crate) fn run(args: &DirtyRateArgs) -> ExitCode {
    let mut limits = Limits::default();
    args.limits.apply_to(&mut limits);
    let samples = match ask(&args.name, &Request::DirtyRate { longest_ms: args.interval }) {
        Ok(Answer::Sampled(samples)) => samples,
        Ok(Answer::Failed(failure)) => return output::failed(&failure),
        Ok(other) => return output::error(Exit::Failed, format!("{} answered {other:?}", args.name)),
        Err(error) => return output::error(Exit::Failed, error),
    };
    let links = if args.bandwidth.is_empty() { &LINKS_MBPS } else { &args.bandwidth[..] };
    let forecasts: Vec<_> = links
        .iter()
        .map(|&mbps| {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let bandwidth = mbps as f64 * 1e6;
            (mbps, Forecast::of(&samples.to_sampled().plan(bandwidth, limits.clone())))
        })
        .collect();
    if args.json {
        let forecasts: Vec<_> = forecasts.iter().map(|(mbps, forecast)| json(*mbps, forecast)).collect();
        outln!("{}", serde_json::json!({ "name": args.name, "sampled": samples, "forecasts": forecasts }));
    } else {
        print(&args.name, &samples, &forecasts);
    }
    Exit::Done.into()
}

fn print(name: &str, samples: &Samples, forecasts: &[(u64, Forecast)]) {
    outln!("{name} has {} of RAM, {} of it touched", Size(samples.ram_bytes), Size(samples.touched_bytes));
    for sample in &samples.samples {
        outln!("  wrote {} in {:.0} ms: {:.0} MB/s", Size(sample.dirty_bytes), sample.ms, sample.mbps);
    }
    if let Some(note) = &samples.note {
        outln!("  ({note})");
    }
    if let (Some(before), Some(watched)) =
        (samples.heartbeats_per_second, samples.heartbeats_per_second_watched)
    {
        outln!("  beats {before:.0} times a second, {watched:.0} while it is watched");
    }
    outln!("To move it would take");
    for (mbps, forecast) in forecasts {
        outln!(
            "  at {mbps:>6} MB/s: {}, {:.1} s, {} sent, a downtime of {:.0} ms, {:.0} ms lost to the guest: {}",
            match forecast.rounds.len() {
                1 => "1 round".to_owned(),
                rounds => format!("{rounds} rounds"),
            },
            forecast.total.as_secs_f64(),
            Size(forecast.sent_bytes),
            forecast.downtime.total().as_secs_f64() * 1e3,
            forecast.lost.total().as_secs_f64() * 1e3,
            verdict(forecast)
        );
        for course in &forecast.courses {
            outln!("        {course}");
        }
    }
}

/// The end of such a migration, in words.
fn verdict(forecast: &Forecast) -> String {
    let help = forecast.advice.or(forecast.diverging.map(|diverging| diverging.help));
    let help = help.map_or(String::new(), |help| format!("; it would take {help}"));
    match forecast.end {
        Decision::Stop => format!("it would be stopped for that{help}"),
        Decision::GiveUp => format!("it would not move{help}"),
        _ if forecast.throttle_percent > 0 => {
            format!("it would move, slowed by up to {} %", forecast.throttle_percent)
        }
        _ if forecast.diverging.is_some() => {
            format!("it would move once {:.0} ms are allowed", forecast.allowed.as_secs_f64() * 1e3)
        }
        _ => "it would move by itself".into(),
    }
}

fn json(mbps: u64, forecast: &Forecast) -> serde_json::Value {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    serde_json::json!({
        "bandwidth_mbps": mbps,
        "moves": forecast.end != Decision::GiveUp,
        "by_itself": forecast.end == Decision::Switch && forecast.diverging.is_none(),
        "rounds": forecast.rounds.len(),
        "total_ms": ms(forecast.total),
        "downtime_ms": ms(forecast.downtime.total()),
        "downtime_allowed_ms": ms(forecast.allowed),
        "throttle_percent": forecast.throttle_percent,
        "lost": {
            "total_ms": ms(forecast.lost.total()),
            "downtime_ms": ms(forecast.lost.downtime),
            "throttling_ms": ms(forecast.lost.throttling),
            "tracking_ms": ms(forecast.lost.tracking),
        },
        "courses": forecast.courses,
        "bytes_sent": forecast.sent_bytes,
        "why": forecast.diverging.map(|diverging| diverging.to_string()),
        "help": forecast.advice.or(forecast.diverging.map(|diverging| diverging.help)).map(|help| help.to_string()),
    })
}

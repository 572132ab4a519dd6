//! The limits of a migration, defined once for all uses: options, `--set`, the control socket, and output.

use std::num::NonZeroU64;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser};
use serde::{Deserialize, Serialize};
use sterna::convergence::{IfStuck, Limits};

/// When to switch, and what to do when the rounds do not get short enough. A limit that is not given keeps
/// its value.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct LimitArgs {
    /// Longest downtime at the switch, in ms [default: 300]
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// How far the downtime limit may be raised if the rounds do not come down to it, in ms; the limit itself
    /// forbids it [default: 5 times the limit]
    #[arg(long, value_name = "MS")]
    downtime_max: Option<u64>,
    /// Send no faster than this, in MB/s; 0 is no limit [default: 0]
    #[arg(long, value_name = "MB/S")]
    bandwidth_limit: Option<u64>,
    /// Send at most this many rounds while the guest runs [default: 100]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    max_rounds: Option<u32>,
    /// Switch or give up, as --if-stuck says, after this many seconds; 0 is no limit [default: 0]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Throttle the guest by at most this many percent; 0 never does [default: 99]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=99), value_name = "PERCENT")]
    throttle_max: Option<u8>,
    /// Take at most this much of the guest's time in all, by pausing and throttling it and recording its
    /// writes, in ms; 0 is no limit [default: 0]
    #[arg(long, value_name = "MS")]
    lost_max: Option<u64>,
    /// What to do when the rounds do not come down to the downtime limit: `auto` does after each round what
    /// costs the guest least of its time, and gives up once nothing within the limits helps. Or policies in
    /// this order: `throttle` slows the guest, `relax` allows more downtime, `stop` switches all the same,
    /// `abort` gives up. Without the last two the migration continues until rounds or time are used up, and
    /// then gives up [default: auto]
    #[arg(long, value_name = "POLICY,...")]
    if_stuck: Option<IfStuck>,
}

impl LimitArgs {
    /// Changes the given limits.
    pub(crate) fn apply_to(&self, limits: &mut Limits) {
        let Self { downtime_limit, downtime_max, bandwidth_limit, max_rounds, timeout, .. } = *self;
        let ms = |given: Option<u64>| given.map(Duration::from_millis);
        limits.downtime = ms(downtime_limit).unwrap_or(limits.downtime);
        limits.downtime_max = ms(downtime_max).or(limits.downtime_max);
        if let Some(megabytes) = bandwidth_limit {
            limits.bandwidth_max = NonZeroU64::new(megabytes.saturating_mul(1_000_000));
        }
        limits.rounds_max = max_rounds.unwrap_or(limits.rounds_max);
        if let Some(seconds) = timeout {
            limits.timeout = (seconds > 0).then_some(Duration::from_secs(seconds));
        }
        let throttle_max = self.throttle_max.map(|percent| percent.min(99));
        limits.throttle_max_percent = throttle_max.unwrap_or(limits.throttle_max_percent);
        if let Some(lost_max) = self.lost_max {
            limits.lost_max = (lost_max > 0).then_some(Duration::from_millis(lost_max));
        }
        if let Some(if_stuck) = &self.if_stuck {
            limits.if_stuck = if_stuck.clone();
        }
    }

    /// The limits of `--set downtime-limit=50 ...`, by the names and within the bounds of their options.
    pub(crate) fn of_settings(settings: &[String]) -> Result<Self, String> {
        // A bare `--` would end the options, and be no error.
        let words =
            settings.iter().map(|setting| format!("--{}", if setting.is_empty() { "=" } else { setting }));
        let parsed = OnlyLimits::try_parse_from(["set".to_owned()].into_iter().chain(words));
        parsed.map(|only| only.limits).map_err(|error| {
            let first = error.to_string().lines().next().unwrap_or_default().replace("error: ", "");
            let names: Vec<_> = options().into_iter().map(|(name, _)| name).collect();
            format!("--set takes LIMIT=VALUE, LIMIT one of {}: {first}", names.join(", "))
        })
    }
}

impl From<&Limits> for LimitArgs {
    fn from(limits: &Limits) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            downtime_limit: Some(ms(limits.downtime)),
            downtime_max: Some(ms(limits.downtime_relaxed_max())),
            bandwidth_limit: Some(limits.bandwidth_max.map_or(0, NonZeroU64::get) / 1_000_000),
            max_rounds: Some(limits.rounds_max),
            timeout: Some(limits.timeout.map_or(0, |timeout| timeout.as_secs())),
            throttle_max: Some(limits.throttle_max_percent),
            lost_max: Some(limits.lost_max.map_or(0, ms)),
            if_stuck: Some(limits.if_stuck.clone()),
        }
    }
}

/// The limits in a line, by the names of their options.
pub(crate) fn line(limits: &Limits) -> String {
    let values = match serde_json::to_value(LimitArgs::from(limits)) {
        Ok(serde_json::Value::Object(values)) => values,
        _ => serde_json::Map::new(),
    };
    let shown = |(name, unit): (String, String)| {
        let value = values.get(&name.replace('-', "_"))?;
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let unit = match unit.as_str() {
            "MS" => " ms",
            "MB/S" => " MB/s",
            "SECONDS" => " s",
            "PERCENT" => " %",
            _ => "",
        };
        let none = value == "0" && ["bandwidth-limit", "timeout", "lost-max"].contains(&name.as_str());
        Some(if none { format!("{name} no") } else { format!("{name} {value}{unit}") })
    };
    options().into_iter().filter_map(shown).collect::<Vec<_>>().join(", ")
}

/// The names of the options, and their units as in the help.
fn options() -> Vec<(String, String)> {
    let command = OnlyLimits::command();
    let option = |argument: &clap::Arg| {
        let unit = argument.get_value_names()?.first()?.to_string();
        Some((argument.get_long()?.to_owned(), unit))
    };
    command
        .get_arguments()
        .filter(|argument| argument.get_long() != Some("help"))
        .filter_map(option)
        .collect()
}

/// The options of [`LimitArgs`] alone, to parse `--set` with.
#[derive(Debug, Parser)]
struct OnlyLimits {
    #[command(flatten)]
    limits: LimitArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(settings: &[&str]) -> Result<LimitArgs, String> {
        LimitArgs::of_settings(&settings.iter().map(|&setting| setting.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn limits_are_set_by_the_names_and_within_the_bounds_of_their_options() {
        let given = set(&["downtime-limit=50", "bandwidth-limit=0", "if-stuck=relax, stop"]).unwrap();
        let expected = LimitArgs {
            downtime_limit: Some(50),
            bandwidth_limit: Some(0),
            if_stuck: Some("relax,stop".parse().unwrap()),
            ..LimitArgs::default()
        };
        assert_eq!(given, expected);
        for wrong in
            ["downtime-limit", "downtime-limit=soon", "throttle-max=100", "lanes=2", "if-stuck=wait", "=", ""]
        {
            let error = set(&[wrong]).unwrap_err();
            assert!(
                error.contains("one of downtime-limit, downtime-max, bandwidth-limit"),
                "{wrong}: {error}"
            );
        }
    }

    #[test]
    fn limits_that_are_given_are_changed_and_the_others_stay() {
        let mut limits = Limits::default();
        let given = set(&["bandwidth-limit=50", "timeout=9", "throttle-max=7"]).unwrap();
        // As received over the control socket.
        let given: LimitArgs = serde_json::from_value(serde_json::to_value(&given).unwrap()).unwrap();
        given.apply_to(&mut limits);
        let expected = Limits {
            bandwidth_max: NonZeroU64::new(50_000_000),
            timeout: Some(Duration::from_secs(9)),
            throttle_max_percent: 7,
            ..Limits::default()
        };
        assert_eq!(limits, expected);
        set(&["bandwidth-limit=0", "timeout=0", "throttle-max=99"]).unwrap().apply_to(&mut limits);
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn limits_are_shown_by_the_names_of_their_options() {
        let limits = Limits { bandwidth_max: NonZeroU64::new(50_000_000), ..Limits::default() };
        assert_eq!(
            line(&limits),
            "downtime-limit 300 ms, downtime-max 1500 ms, bandwidth-limit 50 MB/s, max-rounds 100, timeout no, \
             throttle-max 99 %, lost-max no, if-stuck auto"
        );
    }
}

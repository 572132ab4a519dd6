use std::time::Duration;

/// Time that a migration takes from the guest, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// The guest was paused.
    pub downtime: Duration,
    /// The share of the guest's time that throttling took.
    pub throttling: Duration,
    /// The share that recording its writes took.
    pub tracking: Duration,
}

impl Lost {
    /// All causes.
    #[must_use]
    pub fn total(&self) -> Duration {
        let Self { downtime, throttling, tracking } = *self;
        downtime.saturating_add(throttling).saturating_add(tracking)
    }

    /// The share of `time` that tracking took from a guest which beats `before` times a second at full speed
    /// and beat `now` times a second while it was slowed by `throttle_percent`.
    #[must_use]
    pub fn to_tracking(time: Duration, (before, now): (f64, f64), throttle_percent: u8) -> Duration {
        let running = f64::from(100 - throttle_percent.min(100)) / 100.0;
        let expected = before * running;
        if expected <= 0.0 {
            return Duration::ZERO;
        }
        // What the guest lost of the time that throttling left.
        time.mul_f64(running * (1.0 - now / expected).clamp(0.0, 1.0))
    }
}

/// The share of `time` that throttling by so many percent takes.
#[must_use]
pub(super) fn to_throttling(time: Duration, throttle_percent: u8) -> Duration {
    time.mul_f64(f64::from(throttle_percent.min(100)) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracking_is_charged_with_what_throttling_does_not_explain() {
        let second = Duration::from_secs(1);
        for (beats, percent, ms) in [
            ((1000.0, 900.0), 0, 100),
            ((1000.0, 1010.0), 0, 0),
            ((1000.0, 400.0), 50, 100),
            ((0.0, 0.0), 0, 0),
        ] {
            let lost = Lost::to_tracking(second, beats, percent).as_secs_f64() * 1e3;
            assert!((lost - f64::from(ms)).abs() < 0.001, "{lost} ms of {beats:?} at {percent} %");
        }
    }
}

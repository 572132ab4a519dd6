//! How fast the guest writes its memory, by QEMU's own measure.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use strum::Display;

use super::Monitor;
use super::machine::Version;
use crate::qmp::QmpError;

/// How QEMU measures.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq)]
#[strum(serialize_all = "kebab-case")]
pub enum DirtyRateMode {
    /// KVM's bitmap counts pages. Without KVM it counts none.
    DirtyBitmap,
    /// KVM's rings count pages, where the guest has rings.
    DirtyRing,
    /// Some pages of each block of 128 MiB and more are compared with themselves.
    PageSampling,
}

/// How much the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRate {
    /// The interval.
    pub interval: Duration,
    /// MiB of pages a second that changed in it, each counted once.
    pub mib_per_second: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    status: String,
    dirty_rate: Option<u64>,
    calc_time: u64,
}

impl Monitor {
    /// Measures for about this long, at least for the [shortest interval](shortest_interval) and at most for
    /// 60 s. The guest must not be migrating.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn dirty_rate(
        &self,
        version: Version,
        interval: Duration,
        mode: DirtyRateMode,
    ) -> Result<DirtyRate, QmpError> {
        let interval = interval.clamp(shortest_interval(version), INTERVAL_MAX);
        let mut question = json!({});
        let (time, unit) = if version >= MILLISECONDS_FROM {
            question["calc-time-unit"] = json!("millisecond");
            (interval.as_millis(), Duration::from_millis(1))
        } else {
            (interval.as_secs().into(), Duration::from_secs(1))
        };
        let mut arguments = question.clone();
        // At most 60,000.
        arguments["calc-time"] = json!(u64::try_from(time).unwrap_or(u64::MAX));
        arguments["mode"] = json!(mode.to_string());
        if mode == DirtyRateMode::PageSampling {
            arguments["sample-pages"] = json!(SAMPLE_PAGES);
        }
        self.tell(BEGIN, &arguments)?;
        let deadline = Instant::now() + interval + ENDS_WITHIN;
        let measured = self.client().wait_until(deadline, |_| {
            let answer: Answer = self.ask(RESULT, &question)?;
            Ok::<_, QmpError>((answer.status == "measured").then_some(answer))
        })?;
        let Some(Answer { dirty_rate: Some(mib_per_second), calc_time, .. }) = measured else {
            return Err(QmpError::words(RESULT, "no measurement has ended"));
        };
        let interval = unit.saturating_mul(u32::try_from(calc_time).unwrap_or(u32::MAX));
        Ok(DirtyRate { interval, mib_per_second })
    }
}

/// The shortest interval that this version can measure.
#[must_use]
pub fn shortest_interval(version: Version) -> Duration {
    if version >= MILLISECONDS_FROM { Duration::from_millis(50) } else { Duration::from_secs(1) }
}

const MILLISECONDS_FROM: Version = Version { major: 8, minor: 2, micro: 0 };

const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// How many pages of a GiB are compared: the most that QEMU allows.
const SAMPLE_PAGES: u64 = 16_384;

/// How much longer than the interval a measurement may take.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

const BEGIN: &str = "calc-dirty-rate";
const RESULT: &str = "query-dirty-rate";

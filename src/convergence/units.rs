//! Units of limits where they are written down, as their names say: milliseconds, seconds, MB/s.

use std::num::NonZeroU64;
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration as milliseconds.
pub(super) mod ms {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        value: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        (value.as_secs_f64() * 1e3).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        seconds_of(f64::deserialize(deserializer)? / 1e3)
    }
}

/// A duration as milliseconds, if there is one.
pub(super) mod ms_if_any {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(|value| value.as_secs_f64() * 1e3).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<f64>::deserialize(deserializer)?.map(|value| seconds_of(value / 1e3)).transpose()
    }
}

/// A duration as seconds, if there is one.
pub(super) mod s_if_any {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(|value| value.as_secs_f64()).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<f64>::deserialize(deserializer)?.map(seconds_of).transpose()
    }
}

/// Bytes a second as MB/s (10⁶ bytes), if there is a rate.
pub(super) mod mbps_if_any {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        value: &Option<NonZeroU64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        value.map(|rate| rate.get() as f64 / 1e6).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<NonZeroU64>, D::Error> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` clamps")]
        let rate = |mbps: f64| NonZeroU64::new((mbps * 1e6).round() as u64);
        Ok(Option::<f64>::deserialize(deserializer)?.and_then(rate))
    }
}

fn seconds_of<E: Error>(seconds: f64) -> Result<Duration, E> {
    Duration::try_from_secs_f64(seconds).map_err(E::custom)
}

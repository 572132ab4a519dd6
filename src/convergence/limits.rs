use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use super::units::{mbps_if_any, ms, ms_if_any, s_if_any};
use crate::error_code::coded;

/// The limits that the operator sets for a migration. All may be changed while the migration runs.
///
/// Events and reports carry them in the units of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// How long the guest may be paused at the switch.
    #[serde(rename = "downtime_limit_ms", with = "ms")]
    pub downtime: Duration,
    /// How far [`Policy::Relax`] may raise the downtime; `None` is [`Limits::RELAX_FACTOR`] times as far.
    #[serde(rename = "downtime_max_ms", with = "ms_if_any")]
    pub downtime_max: Option<Duration>,
    /// The most rounds while the guest runs.
    #[serde(rename = "max_rounds")]
    pub rounds_max: u32,
    /// The time limit until the switch begins; `None` is no limit.
    #[serde(rename = "timeout_s", with = "s_if_any")]
    pub timeout: Option<Duration>,
    /// How far the guest may be slowed when the rounds do not get smaller, in percent; 0 forbids it.
    pub throttle_max_percent: u8,
    /// How much of the guest's time the migration may take in all, by pausing it, slowing it and recording
    /// its writes; `None` is no limit.
    #[serde(rename = "lost_max_ms", with = "ms_if_any", default)]
    pub lost_max: Option<Duration>,
    /// How many bytes of pages may be sent each second, over all lanes; `None` is no limit. It holds for the
    /// last round too, so the switch has the bandwidth that the rounds measured.
    #[serde(rename = "bandwidth_limit_mbps", with = "mbps_if_any")]
    pub bandwidth_max: Option<NonZeroU64>,
    /// What to do when the rounds do not come down to the downtime.
    pub if_stuck: IfStuck,
}

impl Limits {
    /// How far [`Policy::Relax`] raises the downtime by default.
    pub const RELAX_FACTOR: u32 = 5;

    /// How far [`Policy::Relax`] may raise the downtime.
    #[must_use]
    pub fn downtime_relaxed_max(&self) -> Duration {
        self.downtime_max.unwrap_or(self.downtime * Self::RELAX_FACTOR).max(self.downtime)
    }
}

impl Default for Limits {
    /// 300 ms, as in other hypervisors. A hundred rounds: a guest that writes at 0.85 of the bandwidth needs
    /// about fifty to shrink a round of a minute to the last 50 ms, which takes six minutes in total.
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            downtime_max: None,
            rounds_max: 100,
            timeout: None,
            throttle_max_percent: 99,
            lost_max: None,
            bandwidth_max: None,
            if_stuck: IfStuck::default(),
        }
    }
}

/// A reaction to rounds that do not come down to the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// After each round, whatever costs the guest least of its time within the limits.
    Auto,
    /// Slow the guest, step by step.
    Throttle,
    /// Allow more downtime, step by step.
    Relax,
    /// Switch now, whatever the downtime.
    Stop,
    /// Give up; the guest runs on at the source.
    Abort,
}

impl Policy {
    const ALL: [Self; 5] = [Self::Auto, Self::Throttle, Self::Relax, Self::Stop, Self::Abort];

    fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Throttle => "throttle",
            Self::Relax => "relax",
            Self::Stop => "stop",
            Self::Abort => "abort",
        }
    }

    /// Whether no policy can follow it.
    fn is_final(self) -> bool {
        matches!(self, Self::Auto | Self::Stop | Self::Abort)
    }
}

/// Policies in the order in which they are tried, each when those before it are exhausted.
///
/// [`Policy::Auto`] stands alone. It weighs all measures against each other, and gives up as soon as none can
/// bring the migration to its end within the limits.
///
/// A chain without `stop` or `abort` at its end continues with rounds until [`Limits::rounds_max`] or the
/// time limit is reached; then the migration gives up. What was done in vain is taken back before that. If
/// the downtime limit is below the cost of a switch with nothing left to send, no round can help, and the
/// migration gives up at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfStuck(Vec<Policy>);

impl Default for IfStuck {
    fn default() -> Self {
        Self(vec![Policy::Auto])
    }
}

impl IfStuck {
    /// A chain of policies.
    ///
    /// # Errors
    /// [`IfStuckError`] if it is empty, repeats a policy, or has a policy after `stop` or `abort`.
    pub fn new(policies: &[Policy]) -> Result<Self, IfStuckError> {
        if policies.is_empty() {
            return Err(IfStuckError::Empty);
        }
        for (index, &policy) in policies.iter().enumerate() {
            if policies[..index].contains(&policy) {
                return Err(IfStuckError::Twice(policy.word()));
            }
            if policy == Policy::Auto && index > 0 {
                return Err(IfStuckError::NotAlone);
            }
            if policy.is_final() && index + 1 < policies.len() {
                return Err(IfStuckError::AfterTheEnd(policy.word()));
            }
        }
        Ok(Self(policies.to_vec()))
    }

    /// The policies in order.
    #[must_use]
    pub fn policies(&self) -> &[Policy] {
        &self.0
    }

    /// Whether it weighs all measures against each other.
    #[must_use]
    pub fn is_auto(&self) -> bool {
        self.0 == [Policy::Auto]
    }

    /// Whether it ends with a switch, whatever the downtime.
    #[must_use]
    pub fn ends_with_stop(&self) -> bool {
        self.0.last() == Some(&Policy::Stop)
    }

    /// Whether a migration that reaches its time limit can only give up: no policy would have it switch
    /// instead.
    #[must_use]
    pub fn gives_up(&self) -> bool {
        !self.is_auto() && !self.0.contains(&Policy::Relax) && !self.ends_with_stop()
    }
}

impl FromStr for IfStuck {
    type Err = IfStuckError;

    fn from_str(text: &str) -> Result<Self, IfStuckError> {
        let policy = |word: &str| {
            let word = word.trim();
            let unknown = || IfStuckError::Unknown(word.chars().take(40).collect());
            Policy::ALL.into_iter().find(|policy| policy.word() == word).ok_or_else(unknown)
        };
        Self::new(&text.split(',').map(policy).collect::<Result<Vec<_>, _>>()?)
    }
}

impl TryFrom<String> for IfStuck {
    type Error = IfStuckError;

    fn try_from(text: String) -> Result<Self, IfStuckError> {
        text.parse()
    }
}

impl From<IfStuck> for String {
    fn from(chain: IfStuck) -> Self {
        chain.to_string()
    }
}

impl fmt::Display for IfStuck {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.0.iter().map(|policy| policy.word()).collect();
        formatter.write_str(&words.join(","))
    }
}

/// Errors in a chain of policies.
#[derive(Clone, Debug, PartialEq, Eq, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(IfStuckErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
pub enum IfStuckError {
    /// The chain names no policy.
    #[error("say at least one of auto, throttle, relax, stop, abort")]
    Empty,
    /// The chain has a word that names no policy.
    #[error("`{0}` is none of auto, throttle, relax, stop, abort")]
    Unknown(String),
    /// The chain names a policy twice.
    #[error("`{0}` is named twice")]
    Twice(&'static str),
    /// The chain has `auto` and another policy.
    #[error("`auto` weighs all policies and stands alone")]
    NotAlone,
    /// The chain has a policy after one that ends the rounds.
    #[error("nothing can come after `{0}`, which ends the rounds")]
    AfterTheEnd(&'static str),
}

coded!(IfStuckError, IfStuckErrorKind, "policy");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_read_as_it_is_written() {
        for text in ["auto", "throttle", "relax", "stop", "abort", "throttle,relax", "relax,throttle,stop"] {
            assert_eq!(text.parse::<IfStuck>().unwrap().to_string(), text);
        }
        assert_eq!("throttle, abort".parse::<IfStuck>().unwrap().to_string(), "throttle,abort");
        assert_eq!(IfStuck::default().to_string(), "auto");
    }

    #[test]
    fn a_chain_that_says_nothing_or_too_much_is_refused() {
        let error = |text: &str| text.parse::<IfStuck>().unwrap_err();
        assert_eq!(error("wait"), IfStuckError::Unknown("wait".into()));
        assert_eq!(error(""), IfStuckError::Unknown(String::new()));
        assert_eq!(error("relax,relax"), IfStuckError::Twice("relax"));
        assert_eq!(error("abort,throttle"), IfStuckError::AfterTheEnd("abort"));
        assert_eq!(error("throttle,auto"), IfStuckError::NotAlone);
        assert_eq!(error("auto,stop"), IfStuckError::AfterTheEnd("auto"));
        assert_eq!(error("stop,abort"), IfStuckError::AfterTheEnd("stop"));
        assert_eq!(IfStuck::new(&[]), Err(IfStuckError::Empty));
    }

    #[test]
    fn relaxing_never_lowers_the_limit() {
        let limits = Limits { downtime_max: Some(Duration::from_millis(1)), ..Limits::default() };
        assert_eq!(limits.downtime_relaxed_max(), limits.downtime);
        assert_eq!(Limits::default().downtime_relaxed_max(), Duration::from_millis(1500));
    }
}

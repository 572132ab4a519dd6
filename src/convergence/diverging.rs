use std::fmt;
use std::time::Duration;

/// Why a migration will not come to a switch within its limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Diverging {
    /// In a word.
    pub why: Why,
    /// Bytes a second of new pages that the guest wrote in the last round.
    pub dirty_rate: f64,
    /// Bytes a second that the link carries; `None` if nothing was sent yet that would tell.
    pub bandwidth: Option<f64>,
    /// What a switch would take now; `None` if that hangs on the bandwidth, and it is not known.
    pub predicted: Option<Duration>,
    /// What it would take with nothing left to send.
    pub fixed: Duration,
    /// What would change that; any of it.
    pub help: Help,
}

/// Why, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A switch takes longer than is allowed, even with nothing left to send.
    LimitTooLow,
    /// The guest writes new pages as fast as they can be sent, or faster.
    GuestTooFast,
    /// Rounds get smaller, but not within the rounds or the time allowed.
    TooSlow,
}

/// What would help.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Help {
    /// To allow this much downtime; `None` if it is not known how much.
    pub downtime: Option<Duration>,
    /// A link that carries so many bytes a second, or more: a guest that writes all of its working set in every round may
    /// write it many times over, which does not show.
    pub bandwidth: Option<f64>,
    /// That the link could carry more: what holds it to its bandwidth is the limit.
    pub limited: bool,
    /// To slow the guest by so many percent, or more, for the same reason.
    pub throttle_percent: Option<u8>,
}

impl fmt::Display for Diverging {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { why, dirty_rate, bandwidth, predicted, fixed, .. } = self;
        let ms = |duration: &Duration| duration.as_secs_f64() * 1e3;
        if *why == Why::LimitTooLow {
            return write!(formatter, "a switch takes {:.1} ms even with nothing left to send", ms(fixed));
        }
        write!(formatter, "the guest writes {:.0} MB/s of new pages and ", dirty_rate / 1e6)?;
        match bandwidth {
            Some(bandwidth) => write!(formatter, "{:.0} MB/s can be sent: ", bandwidth / 1e6)?,
            None => write!(formatter, "how much can be sent is not known yet: ")?,
        }
        match why {
            Why::LimitTooLow | Why::GuestTooFast => write!(formatter, "the downtime stays near ")?,
            Why::TooSlow => {
                write!(
                    formatter,
                    "the rounds and the time allowed do not bring the downtime below the limit, it would be "
                )?;
            }
        }
        match predicted {
            Some(predicted) => write!(formatter, "{:.0} ms now", ms(predicted)),
            None => write!(formatter, "an unknown time now"),
        }
    }
}

impl fmt::Display for Help {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.downtime {
            Some(downtime) => {
                write!(formatter, "a downtime limit of {:.0} ms", (downtime.as_secs_f64() * 1e3).ceil())?;
            }
            None => write!(formatter, "more rounds or more time, until it is known")?,
        }
        if let Some(bandwidth) = self.bandwidth {
            let what = if self.limited { "bandwidth limit" } else { "link" };
            write!(formatter, ", or a {what} of {:.0} MB/s at least", (bandwidth / 1e6).ceil())?;
        }
        if let Some(percent) = self.throttle_percent {
            write!(formatter, ", or to slow the guest by {percent} % at least")?;
        }
        Ok(())
    }
}

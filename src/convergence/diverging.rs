use std::fmt;
use std::time::Duration;

/// Why a migration will not come to a switch within its limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Diverging {
    /// The kind of reason.
    pub why: Why,
    /// Bytes a second of new pages that the guest wrote in the last round.
    pub dirty_rate: f64,
    /// Bytes a second that the link carries; `None` if too little was sent to measure it.
    pub bandwidth: Option<f64>,
    /// The downtime of a switch now; `None` if it depends on an unknown bandwidth.
    pub predicted: Option<Duration>,
    /// The downtime of a switch with nothing left to send.
    pub fixed: Duration,
    /// Changes that would help; each suffices.
    pub help: Help,
}

/// The kind of reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A switch takes longer than is allowed, even with nothing left to send.
    LimitTooLow,
    /// The guest writes new pages as fast as they can be sent, or faster.
    GuestTooFast,
    /// Rounds get smaller, but not within the rounds or the time allowed.
    TooSlow,
}

/// Changes that would help.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Help {
    /// Allow this much downtime; `None` if the amount is unknown.
    pub downtime: Option<Duration>,
    /// A link that carries this many bytes a second, or more: a guest that writes all of its working set in
    /// every round may write it many times over, which the dirty log does not show.
    pub bandwidth: Option<f64>,
    /// Whether the link could carry more, because the bandwidth limit caps it.
    pub limited: bool,
    /// Slow the guest by this many percent, or more, for the same reason.
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

use std::fmt;
use std::time::Duration;

/// Why a migration will not come to a switch within its limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Diverging {
    /// The kind of reason.
    pub why: Why,
    /// Bytes a second of new pages that the guest wrote in the last round, or in a shorter time if it was
    /// watched for one.
    pub dirty_rate: f64,
    /// Whether each round writes all of a hot set: the guest may write it much faster than `dirty_rate`.
    pub is_saturated: bool,
    /// Bytes a second that the link carries, or that the VMM names and the link carries; `None` if too little
    /// was sent to measure it.
    pub bandwidth: Option<f64>,
    /// Whether sending waits for the VMM to name pages.
    pub is_named: bool,
    /// The downtime of a switch now; `None` if it depends on an unknown bandwidth.
    pub predicted: Option<Duration>,
    /// The downtime of a switch with nothing left to send.
    pub fixed: Duration,
    /// What was done in vain.
    pub tried: Option<Futile>,
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
    /// The guest would lose more of its time than it may.
    LostTooMuch,
}

/// A throttle that did not have the effect that was predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Futile {
    /// How far the guest was slowed.
    pub throttle_percent: u8,
    /// Over how many rounds.
    pub rounds: u32,
}

/// Changes that would help.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Help {
    /// Allow this much downtime; `None` if the amount is unknown.
    pub downtime: Option<Duration>,
    /// A link that carries this many bytes a second, or more.
    pub bandwidth: Option<f64>,
    /// Whether the link could carry more, because the bandwidth limit caps it.
    pub limited: bool,
    /// Slow the guest by this many percent, or more; `None` also if how fast it writes is not visible.
    pub throttle_percent: Option<u8>,
    /// Allow that the guest loses this much time.
    pub lost: Option<Duration>,
}

impl fmt::Display for Diverging {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { why, dirty_rate, is_saturated, bandwidth, is_named, predicted, fixed, tried, .. } = self;
        if *why == Why::LimitTooLow {
            return write!(formatter, "a switch takes {:.1} ms even with nothing left to send", ms(fixed));
        }
        if *why == Why::LostTooMuch {
            let needed = ms(fixed);
            return write!(
                formatter,
                "the guest has lost so much time that a switch of {needed:.1} ms would exceed what it may lose"
            );
        }
        let at_least = if *is_saturated { "at least " } else { "" };
        write!(formatter, "the guest writes {at_least}{:.0} MB/s of new pages and ", dirty_rate / 1e6)?;
        match bandwidth {
            Some(bandwidth) => {
                let sent = if *is_named { "named by its VMM and sent" } else { "sent" };
                write!(formatter, "{:.0} MB/s can be {sent}: ", bandwidth / 1e6)?;
            }
            None => write!(formatter, "how much can be sent is not known yet: ")?,
        }
        match why {
            Why::LimitTooLow | Why::GuestTooFast | Why::LostTooMuch => {
                write!(formatter, "the downtime stays near ")?;
            }
            Why::TooSlow => {
                write!(
                    formatter,
                    "the rounds and the time allowed do not bring the downtime below the limit, it would be "
                )?;
            }
        }
        match predicted {
            Some(predicted) => write!(formatter, "{:.0} ms now", ms(predicted))?,
            None => write!(formatter, "an unknown time now")?,
        }
        if let Some(Futile { throttle_percent, rounds }) = tried {
            write!(formatter, "; to slow it by {throttle_percent} % in {rounds} rounds had no effect")?;
        }
        Ok(())
    }
}

impl fmt::Display for Help {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.lost, self.downtime) {
            (Some(lost), _) => write!(formatter, "to allow that the guest loses {:.0} ms", ms(&lost).ceil())?,
            (_, Some(downtime)) => write!(formatter, "a downtime limit of {:.0} ms", ms(&downtime).ceil())?,
            (_, None) => write!(formatter, "more rounds or more time, until it is known")?,
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

fn ms(duration: &Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

//! What a trusted host may do.

use std::fmt;
use std::str::FromStr;

use crate::trust_error::TrustError;

/// One thing that a trusted host may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Send guests to this host. It may then also ask about them.
    Send,
    /// Receive guests of this host.
    Receive,
    /// Send files to this host, and receive files of this host.
    Images,
    /// Ask about guests that it has sent earlier, and settle what is open about them.
    Ask,
}

impl Right {
    const ALL: [Self; 4] = [Self::Send, Self::Receive, Self::Images, Self::Ask];

    fn word(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Images => "images",
            Self::Ask => "ask",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Send => "send guests to this host",
            Self::Receive => "receive guests of this host",
            Self::Images => "exchange files with this host",
            Self::Ask => "ask about guests",
        })
    }
}

/// All that a trusted host may do, as words with commas in between: `send,ask`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rights([bool; 4]);

impl Rights {
    /// Every right.
    #[must_use]
    pub fn all() -> Self {
        Self([true; 4])
    }

    /// Whether they include this right.
    #[must_use]
    pub fn include(self, right: Right) -> bool {
        let has = |right: Right| self.0[right as usize];
        // A source that is in doubt about its guest must be able to settle that.
        has(right) || (right == Right::Ask && has(Right::Send))
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = Right::ALL.into_iter().filter(|&right| self.0[right as usize]).map(Right::word);
        formatter.pad(&words.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Rights {
    type Err = TrustError;

    fn from_str(text: &str) -> Result<Self, TrustError> {
        let mut rights = Self([false; 4]);
        for word in text.split(',') {
            let right = Right::ALL.into_iter().find(|right| right.word() == word);
            let right = right.ok_or_else(|| TrustError::Right(word.chars().take(80).collect()))?;
            rights.0[right as usize] = true;
        }
        Ok(rights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read_as_they_are_shown() {
        for text in ["send", "receive,ask", "send,receive,images,ask"] {
            assert_eq!(text.parse::<Rights>().unwrap().to_string(), text);
        }
        assert_eq!("ask,send".parse::<Rights>().unwrap().to_string(), "send,ask");
        for text in ["", "send,", "everything", "Send"] {
            assert!(text.parse::<Rights>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_source_may_ask_about_the_guests_that_it_may_send_and_no_more() {
        let source: Rights = "send".parse().unwrap();
        let may: Vec<_> = Right::ALL.into_iter().filter(|&right| source.include(right)).collect();
        assert_eq!(may, [Right::Send, Right::Ask]);
        let asks: Rights = "ask".parse().unwrap();
        assert!(!asks.include(Right::Send));
    }
}

//! Sizes on the command line: `512M`, `4G`, `65536`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes. Suffixes K, M, G and T are powers of 1,024, with or without `iB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size; write for example 512M or 4G");
        let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let shift = match suffix.to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
            "" if !suffix.starts_with(['i', 'I']) => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(shift, _)| self.0 >= 1 << shift) {
            Some((shift, unit)) if self.0.is_multiple_of(1 << shift) => {
                write!(formatter, "{} {unit}", self.0 >> shift)
            }
            #[expect(clippy::cast_precision_loss, reason = "one decimal for people")]
            Some((shift, unit)) => write!(formatter, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
            None => write!(formatter, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes, written) in [
            ("16M", 16 << 20, "16 MiB"),
            ("1GiB", 1 << 30, "1 GiB"),
            ("5g", 5 << 30, "5 GiB"),
            ("1536K", 1536 << 10, "1.5 MiB"),
            ("100", 100, "100 B"),
            ("2T", 2 << 40, "2 TiB"),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
            assert_eq!(Size(bytes).to_string(), written);
        }
        for text in ["", "M", "-1M", "1.5G", "1X", "99999999999T", "1iB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}

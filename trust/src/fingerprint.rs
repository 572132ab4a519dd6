//! The fingerprint of a key.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ring::digest::{SHA256, digest};

use crate::trust_error::TrustError;

/// SHA-256 of a public key in its DER form (`SubjectPublicKeyInfo`), shown as ssh shows one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a public key.
    #[must_use]
    pub fn of(public_key: &[u8]) -> Self {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, public_key).as_ref());
        Self(fingerprint)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Fingerprint {
    type Err = TrustError;

    fn from_str(text: &str) -> Result<Self, TrustError> {
        let bytes = text.strip_prefix(PREFIX).and_then(|text| STANDARD_NO_PAD.decode(text).ok());
        let fingerprint = bytes.and_then(|bytes| bytes.try_into().ok());
        fingerprint.map(Self).ok_or_else(|| TrustError::Fingerprint(text.chars().take(80).collect()))
    }
}

const PREFIX: &str = "SHA256:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_as_it_is_shown_and_nothing_else_is() {
        let fingerprint = Fingerprint::of(b"a key");
        let shown = fingerprint.to_string();
        assert_eq!(shown.len(), "SHA256:".len() + 43);
        assert_eq!(shown.parse::<Fingerprint>().unwrap(), fingerprint);
        for text in ["", "SHA256:", &shown[7..], &shown[..49], &format!("{shown}="), "MD5:00"] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }
}

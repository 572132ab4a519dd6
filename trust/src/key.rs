//! A host's key.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use crate::fingerprint::Fingerprint;
use crate::trust_error::TrustError;

/// A host's key, by which others know it.
#[derive(Clone)]
pub struct HostKey {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

impl HostKey {
    /// The fingerprint of the public key.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// Makes the text of a new key's file.
    pub(crate) fn make() -> Result<String, TrustError> {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| TrustError::Random)?;
        let text = STANDARD.encode(key.as_ref());
        let lines: Vec<_> =
            text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        Ok(format!("{BEGIN}\n{}\n{END}\n", lines.join("\n")))
    }

    /// Reads the text of a key's file; `None` if it holds no such key.
    pub(crate) fn read(text: &[u8]) -> Option<Self> {
        let key = any_eddsa_type(&PrivatePkcs8KeyDer::from_pem_slice(text).ok()?).ok()?;
        let public_key = key.public_key()?.to_vec();
        let fingerprint = Fingerprint::of(&public_key);
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(public_key)], key));
        Some(Self { certified, fingerprint })
    }
}

impl fmt::Debug for HostKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "HostKey({})", self.fingerprint)
    }
}

const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const END: &str = "-----END PRIVATE KEY-----";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_another_and_the_same_each_time_it_is_read() {
        let [one, other] = [(); 2].map(|()| HostKey::make().unwrap());
        let fingerprint = |text: &str| HostKey::read(text.as_bytes()).unwrap().fingerprint();
        assert_eq!(fingerprint(&one), fingerprint(&one));
        assert_ne!(fingerprint(&one), fingerprint(&other));
        assert!(HostKey::read(&one.as_bytes()[..80]).is_none());
        assert!(HostKey::read(b"").is_none());
    }

    #[test]
    fn what_is_printed_of_a_key_is_its_fingerprint() {
        let text = HostKey::make().unwrap();
        let key = HostKey::read(text.as_bytes()).unwrap();
        assert_eq!(format!("{key:?}"), format!("HostKey({})", key.fingerprint()));
    }
}

//! The provider of cryptography, with its ciphers in the order in which this processor is fast at them.

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};

/// The provider: `ring`, with the ciphers of TLS 1.3 alone.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let mut cipher_suites =
            vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
        if !has_aes() {
            cipher_suites.rotate_right(1);
        }
        Arc::new(CryptoProvider { cipher_suites, ..rustls::crypto::ring::default_provider() })
    };
    PROVIDER.get_or_init(make).clone()
}

/// Whether the processor has instructions for AES-GCM. Without them ChaCha20 is several times as fast.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq");
    #[cfg(not(target_arch = "x86_64"))]
    let has = true;
    has
}

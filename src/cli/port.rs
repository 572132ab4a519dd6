//! The port of a destination.

/// The default port of a destination.
pub(crate) const DEFAULT_PORT: u16 = 7837;

/// `HOST` as `HOST:PORT`; an IPv6 address may be in brackets or bare.
pub(crate) fn with_port(to: &str) -> String {
    match to.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => format!("{host}:{port}"),
        Some(_) if !to.ends_with(']') => format!("[{to}]:{DEFAULT_PORT}"),
        _ => format!("{to}:{DEFAULT_PORT}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_added_where_none_is_given() {
        for (given, full) in [
            ("host", "host:7837"),
            ("host:1", "host:1"),
            ("10.0.0.1", "10.0.0.1:7837"),
            ("fe80::1", "[fe80::1]:7837"),
            ("[fe80::1]", "[fe80::1]:7837"),
            ("[fe80::1]:9", "[fe80::1]:9"),
        ] {
            assert_eq!(with_port(given), full);
        }
    }
}

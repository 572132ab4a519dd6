//! One or several plain TCP streams: `iperf3`.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::failure::Failure;
use super::process::{Running, free_port, quote};

/// The lengths of reads and writes to try: iperf3's default, and its longest, which avoids most of the
/// switching between programs where both ends share a processor.
const BLOCKS: [&str; 2] = ["128K", "1M"];

/// The combined speed of `streams` streams, in MB/s: the faster of both lengths.
pub(crate) fn speed(address: IpAddr, streams: u8, bytes: u64) -> Result<f64, Failure> {
    BLOCKS.iter().try_fold(0.0, |fastest: f64, block| Ok(fastest.max(once(address, streams, bytes, block)?)))
}

fn once(address: IpAddr, streams: u8, bytes: u64, block: &str) -> Result<f64, Failure> {
    let port = free_port(address)?.to_string();
    let start = |arguments: &[&str]| {
        let mut command = Command::new("iperf3");
        Running::start(command.args(arguments).args(["-p", &port]), "iperf3", "iperf3")
    };
    let mut server = start(&["-s", "-1", "-B", &address.to_string()])?;
    server.until_listening(port.parse().unwrap_or_default())?;
    let (streams, bytes) = (streams.to_string(), bytes.to_string());
    let client = start(&["-c", &address.to_string(), "-P", &streams, "-n", &bytes, "-l", block, "-J"])?;
    received(&client.succeed(Duration::from_secs(120))?)
}

/// The bytes received by the client's report, in MB/s.
fn received(report: &str) -> Result<f64, Failure> {
    let not_understood = || Failure::Words { what: "iperf3".into(), said: quote(report) };
    let report: Value = serde_json::from_str(report).map_err(|_| not_understood())?;
    let received = &report["end"]["sum_received"];
    let (bytes, seconds) = (received["bytes"].as_f64(), received["seconds"].as_f64());
    match (bytes, seconds) {
        (Some(bytes), Some(seconds)) if bytes > 0.0 && seconds > 0.0 => Ok(bytes / 1e6 / seconds),
        _ => Err(not_understood()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_counts() {
        let report =
            r#"{"end":{"sum_sent":{"bytes":9e9,"seconds":1.0},"sum_received":{"bytes":3e9,"seconds":2.0}}}"#;
        assert!((received(report).unwrap() - 1500.0).abs() < 1e-6);
    }

    #[test]
    fn an_error_is_no_speed() {
        for report in [
            "",
            "[]",
            r#"{"error":"unable to connect"}"#,
            r#"{"end":{"sum_received":{"bytes":1,"seconds":0}}}"#,
            r#"{"end":{"sum_received":{"bytes":"1","seconds":1}}}"#,
        ] {
            assert!(received(report).is_err(), "{report}");
        }
    }
}

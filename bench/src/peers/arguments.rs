//! What to compare, and how.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// For `--help`.
const HELP: &str = "\
Needs perftest, iperf3 and qemu-system-x86 (Debian's names); what is missing is named in the table, and the rest measured.
Where this machine has no RDMA device, --without-rdma measures the rest, and this measures all:
  cargo build --release --workspace
  STERNA_LAB_MEMORY=10G STERNA_LAB_TIMEOUT=7200 ci/lab uml target/release/sterna-bench peers
A guest of SIZE takes twice that, and some 600 MiB more; the time to the first byte is measured with one of up to 8 GiB.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct PeersArgs {
    /// RAM of the guests, from 192M to 3G
    #[arg(long, default_value = "1G", value_name = "SIZE", value_parser = parse_size)]
    pub(super) memory: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    pub(super) repeat: u8,
    /// A first impression: fewer shapes of the limit, shorter measurements
    #[arg(long)]
    pub(super) quick: bool,
    /// How long a migration may take to converge, in seconds; that of an idle guest may take twice as long
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "S")]
    pub(super) patience: u64,
    /// The longest downtime of a guest, in ms
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "MS")]
    pub(super) downtime_limit: u32,
    /// The largest drift of the limit between its measurements, in percent
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "PERCENT")]
    pub(super) drift_max: u8,
    /// The number of streams in measurements of several streams
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=64), value_name = "N")]
    pub(super) streams: u8,
    /// Measure only these parts, beside the limit
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,…")]
    pub(super) only: Vec<Part>,
    /// Leave QEMU out
    #[arg(long)]
    pub(super) without_qemu: bool,
    /// Leave RDMA out: TCP over the loopback interface, which needs no RDMA device
    #[arg(long, conflicts_with = "device")]
    pub(super) without_rdma: bool,
    /// The RDMA device [default: the first with an active port]
    #[arg(long, value_name = "NAME")]
    pub(super) device: Option<String>,
    /// The sterna command to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub(super) sterna: Option<PathBuf>,
    /// The QEMU to compare with
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    pub(super) qemu: PathBuf,
    /// Also write the tables to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// The parts that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Lanes, iperf3, the zero test, own CPU, the guest of zeros
    Speeds,
    /// Migrations of the idle guest
    Idle,
    /// Migrations of the busy guest
    Loop,
    /// The time to the first byte
    FirstByte,
}

/// `192M` to `3G`: the boot sector reaches no further, and the loop does not fit into less.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size from 192M to 3G");
    let (number, shift) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 20),
        None => (text.strip_suffix(['G', 'g']).ok_or_else(wrong)?, 30),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
    if (192 << 20..=3 << 30).contains(&bytes) { Ok(bytes) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_bounds() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        for text in ["", "M", "1", "191M", "4G", "-1G", "99999999999999999999G", "18446744073709551615G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}

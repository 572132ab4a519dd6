//! What to measure, and how often.

use std::path::PathBuf;

use clap::Args;

/// For `--help`.
const HELP: &str = "\
Without --real, needs about 2 GiB for RAM of 12 TiB, of which only bitmaps are there. With --real, twice the largest guest, \
and an RDMA device. Where this machine has none:
  cargo build --release --workspace
  STERNA_LAB_MEMORY=10G ci/lab uml target/release/sterna-bench blackout --real";

/// As many as a migration has by default.
const LANES: u8 = 4;

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct BlackoutArgs {
    /// A first impression: 64 GiB and 12 TiB, three turns; with --real, 256 MiB and 1 GiB, one migration each
    #[arg(long)]
    pub(super) quick: bool,
    /// How often everything is measured [default: 7; 3 for each real guest]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "N")]
    pub(super) repeat: Option<u8>,
    /// Sizes of synthetic RAM, in GiB [default: 1,64,1024,4096,12288]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=16_384), value_name = "GIB,…")]
    ram: Vec<u64>,
    /// Dirty pages in 10,000 at the pause
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=5000), value_name = "N")]
    pub(super) dirty: u64,
    /// The number of lanes, and so of workers [default: 4; over synthetic RAM no more than processors]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N")]
    lanes: Option<u8>,
    /// Move guests with all of their RAM touched between real processes, in place of synthetic RAM
    #[arg(long)]
    pub(super) real: bool,
    /// RAM of the real guests, in MiB [default: 256,1024,2048,4096]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(16..=65_536), value_name = "MIB,…")]
    pub(super) memory: Vec<u64>,
    /// The transport of real guests' pages: rdma or tcp
    #[arg(long, default_value = "rdma", value_parser = ["rdma", "tcp"])]
    pub(super) transport: String,
    /// The `sterna` command [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub(super) sterna: Option<PathBuf>,
    /// Also write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

impl BlackoutArgs {
    pub(super) fn sizes_gib(&self) -> &[u64] {
        match &self.ram[..] {
            [] if self.quick => &[64, 12_288],
            [] => &[1, 64, 1024, 4096, 12_288],
            sizes => sizes,
        }
    }

    pub(super) fn lanes(&self) -> u8 {
        self.lanes.unwrap_or(LANES)
    }

    /// The number of workers over synthetic RAM: more than processors would measure how they wait for one
    /// another.
    pub(super) fn workers(&self) -> u8 {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        self.lanes.unwrap_or_else(|| u8::try_from(processors).unwrap_or(LANES).min(LANES))
    }

    pub(super) fn turns(&self) -> u8 {
        self.repeat.unwrap_or(if self.quick { 3 } else { 7 })
    }
}

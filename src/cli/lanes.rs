//! The transport of pages on the command line: the same options for guests and for files.

use clap::Args;
use serde::{Deserialize, Serialize};
use sterna::transport::Transports;
use sterna::transport::rdma::{RdmaProvider, RdmaTuning};
use sterna::transport::tcp::TcpProvider;

use super::security::SecurityArgs;
use super::size::Size;

/// The transport, the number of lanes, and their parameters.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
pub(crate) struct LaneArgs {
    /// The transport of the pages
    #[arg(long, value_enum, default_value_t)]
    pub(crate) transport: Transport,
    /// Number of lanes (queue pairs or TCP streams) [default: 4 for RDMA; for TCP as many as processors, at
    /// most 4]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) lanes: Option<u8>,
    /// Pin at most this much memory for RDMA at this end; the rest takes turns [default: what `ulimit -l`
    /// allows]
    #[arg(long, value_name = "SIZE", help_heading = "RDMA")]
    pin_limit: Option<Size>,
    /// The longest single write [default: 1M]
    #[arg(long, value_name = "SIZE", help_heading = "RDMA")]
    rdma_write: Option<Size>,
    /// Number of writes posted with one doorbell [default: 128]
    #[arg(long, value_name = "N", help_heading = "RDMA")]
    rdma_list: Option<u32>,
    /// Signal one write in this many [default: 256]
    #[arg(long, value_name = "N", help_heading = "RDMA")]
    rdma_signal: Option<u32>,
    /// Most bytes in flight on a lane [default: 16M]
    #[arg(long, value_name = "SIZE", help_heading = "RDMA")]
    rdma_window: Option<Size>,
}

impl LaneArgs {
    /// Fails if pages must be encrypted and the transport does not encrypt.
    pub(crate) fn check(&self, security: &SecurityArgs) -> Result<(), String> {
        if security.pages_too() && self.transport == Transport::Rdma {
            return Err("--encrypt required goes with TCP alone: RDMA does not encrypt".into());
        }
        Ok(())
    }

    /// The transports to try, in this order.
    pub(crate) fn transports(&self, security: &SecurityArgs) -> Transports {
        let rdma = RdmaProvider::new(self.tuning());
        match self.transport {
            Transport::Auto if security.pages_too() => TcpProvider.into(),
            Transport::Auto => Transports::from(rdma).then(TcpProvider),
            Transport::Tcp => TcpProvider.into(),
            Transport::Rdma => rdma.into(),
        }
    }

    fn tuning(&self) -> RdmaTuning {
        let default = RdmaTuning::default();
        let bytes = |size: Option<Size>, default: u64| size.map_or(default, |size| size.0);
        RdmaTuning {
            // The wire's unit is the page.
            write_max_bytes: bytes(self.rdma_write, default.write_max_bytes) & !0xfff,
            list_writes: self.rdma_list.unwrap_or(default.list_writes),
            signal_writes: self.rdma_signal.unwrap_or(default.signal_writes),
            window_bytes: bytes(self.rdma_window, default.window_bytes),
            pin_max_bytes: self.pin_limit.map(|size| size.0),
            ..default
        }
    }
}

/// The transports to choose from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    /// RDMA where a device reaches the peer, else TCP
    #[default]
    Auto,
    /// TCP
    Tcp,
    /// RDMA, or fail
    Rdma,
}

//! What can go wrong outside the data path. Posting has [`PostError`](crate::PostError), a failed transfer
//! [`CompletionError`](crate::CompletionError).

use std::fmt;
use std::io;

use crate::endpoint::EndpointError;
use crate::gid::GidError;

/// A verb, a look-up or a check that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine has no libibverbs.
    #[error(
        "libibverbs.so.1 not found ({reason}); RDMA needs it: `apt install libibverbs1 ibverbs-providers`, \
         or `dnf install libibverbs`"
    )]
    LibraryNotFound {
        /// The dynamic loader's message.
        reason: String,
    },

    /// The machine's libibverbs lacks a function.
    #[error("libibverbs.so.1 is too old: it has no `{symbol}`; rdma-core 32 or newer is needed")]
    LibraryTooOld {
        /// The missing function.
        symbol: &'static str,
    },

    /// Neither the kernel nor the library knows an RDMA device.
    #[error(
        "no RDMA device on this machine; load the adapter's driver, or make a soft-RoCE device over an \
         Ethernet interface: `modprobe rdma_rxe && rdma link add rxe0 type rxe netdev INTERFACE`"
    )]
    NoDevice,

    /// The kernel has devices, but the library has no driver for any.
    #[error(
        "the kernel has the RDMA device(s) {devices}, but libibverbs has no driver for them: `apt install \
         ibverbs-providers`, and see that the module ib_uverbs is loaded"
    )]
    NoUserSpaceDriver {
        /// The kernel's devices, separated by commas.
        devices: String,
    },

    /// The machine has RDMA devices, but none of this name.
    #[error("no RDMA device is named `{name}`; there is {available}")]
    NoSuchDevice {
        /// The name asked for.
        name: String,
        /// The names of the machine's devices, separated by commas.
        available: String,
    },

    /// This process may not open the device.
    #[error(
        "cannot open the RDMA device `{device}`: {source}; look at the permissions of \
         /dev/infiniband/uverbs*, and give a container those devices"
    )]
    Open {
        /// Its name.
        device: String,
        /// The errno of `ibv_open_device`.
        source: io::Error,
    },

    /// The device cannot be connected by exchanging endpoints.
    #[error(
        "`{device}` speaks {transport}; queue pairs are connected by endpoint here, which InfiniBand and \
         RoCE devices allow"
    )]
    UnsupportedTransport {
        /// The device's name.
        device: String,
        /// The device's transport.
        transport: String,
    },

    /// A verb or a system call failed.
    #[error("{call} failed: {source}")]
    Call {
        /// Its C name.
        call: &'static str,
        /// Its errno.
        source: io::Error,
    },

    /// Memory could not be pinned for the device.
    #[error(
        "cannot pin {len_bytes} bytes of memory for RDMA ({source}); the limit on locked memory is {}. \
         Raise it with `ulimit -l unlimited`, in a systemd unit with `LimitMEMLOCK=infinity`, in a container \
         with `--ulimit memlock=-1`; or grant CAP_IPC_LOCK. If it is high enough, the machine lacks free \
         memory",
        Limit(*memlock_limit_bytes)
    )]
    Pin {
        /// How much was to be pinned.
        len_bytes: usize,
        /// The soft limit RLIMIT_MEMLOCK of this process; `None` when unlimited. CAP_IPC_LOCK lifts it.
        memlock_limit_bytes: Option<u64>,
        /// The errno of `ibv_reg_mr`.
        source: io::Error,
    },

    /// The region asked for is empty or extends past its mapping.
    #[error(
        "a region of {len_bytes} bytes from byte {offset_bytes} does not lie inside its mapping of \
         {mapping_len_bytes} bytes"
    )]
    RegionOutOfRange {
        /// Its offset in the mapping.
        offset_bytes: usize,
        /// Its length.
        len_bytes: usize,
        /// The mapping's length.
        mapping_len_bytes: usize,
    },

    /// The caller asked for more than the device's limit.
    #[error("{asked} {what} were asked for, and the device allows {limit}")]
    OverLimit {
        /// The limited object.
        what: &'static str,
        /// The number asked for.
        asked: u64,
        /// The device's limit.
        limit: u64,
    },

    /// A connection option does not fit its field in the packets.
    #[error("the connect option {option} is {value}, and {limit} is the most that it can be")]
    ConnectOption {
        /// The field of [`ConnectOptions`](crate::ConnectOptions).
        option: &'static str,
        /// Its value.
        value: u8,
        /// The largest value.
        limit: u8,
    },

    /// Objects of two devices cannot work together.
    #[error("the completion queue and the protection domain belong to different devices")]
    DifferentDevices,

    /// No address of the port fits.
    #[error(transparent)]
    Gid(#[from] GidError),

    /// The peer's endpoint cannot be used.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),

    /// The region is in use and cannot be deregistered.
    #[error(
        "the memory region is still in use; destroy the queue pairs that posted from it first, or have them release it"
    )]
    RegionInUse,

    /// The queue pair is already connected; it connects once.
    #[error("the queue pair is already connected; a new connection takes a new queue pair")]
    AlreadyConnected,

    /// The system gave no random bytes for the first packet sequence number.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
}

/// A limit that may be absent.
struct Limit(Option<u64>);

impl fmt::Display for Limit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(formatter, "{bytes} bytes"),
            None => formatter.write_str("not set"),
        }
    }
}

//! QEMU's ways to move a guest, which differ in the transport.

/// QEMU's ways to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Tcp,
    /// TCP with four channels.
    Multifd,
    /// Memory is registered piece by piece.
    Rdma,
    /// All memory is registered before.
    RdmaPinAll,
}

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "QEMU tcp",
            Self::Multifd => "QEMU tcp, multifd 4",
            Self::Rdma => "QEMU rdma",
            Self::RdmaPinAll => "QEMU rdma-pin-all",
        }
    }

    pub(crate) fn is_rdma(self) -> bool {
        self.scheme() == "rdma"
    }

    pub(super) fn scheme(self) -> &'static str {
        match self {
            Self::Tcp | Self::Multifd => "tcp",
            Self::Rdma | Self::RdmaPinAll => "rdma",
        }
    }

    pub(super) fn capability(self) -> Option<&'static str> {
        match self {
            Self::Tcp | Self::Rdma => None,
            Self::Multifd => Some("multifd"),
            Self::RdmaPinAll => Some("rdma-pin-all"),
        }
    }
}

//! Asynchronous events.

use crate::sys::constants::{
    IBV_EVENT_CLIENT_REREGISTER, IBV_EVENT_COMM_EST, IBV_EVENT_CQ_ERR, IBV_EVENT_DEVICE_FATAL,
    IBV_EVENT_GID_CHANGE, IBV_EVENT_LID_CHANGE, IBV_EVENT_PATH_MIG, IBV_EVENT_PATH_MIG_ERR,
    IBV_EVENT_PKEY_CHANGE, IBV_EVENT_PORT_ACTIVE, IBV_EVENT_PORT_ERR, IBV_EVENT_QP_ACCESS_ERR,
    IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED, IBV_EVENT_QP_REQ_ERR, IBV_EVENT_SM_CHANGE,
    IBV_EVENT_SQ_DRAINED, IBV_EVENT_SRQ_ERR, IBV_EVENT_SRQ_LIMIT_REACHED, IBV_EVENT_WQ_FATAL,
};
use crate::sys::context::RawEvent;

/// Something that happened to a device outside any work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AsyncEvent {
    /// What happened.
    pub kind: AsyncEventKind,
    /// The port it happened to, for events of a port.
    pub port: Option<u8>,
    /// The number of the local queue pair it happened to, for events of a queue pair.
    pub queue_pair: Option<u32>,
}

impl AsyncEvent {
    pub(crate) fn from_raw(raw: &RawEvent) -> AsyncEvent {
        AsyncEvent {
            kind: AsyncEventKind::from_raw(raw.event_type),
            port: raw.port,
            queue_pair: raw.queue_pair,
        }
    }
}

/// What happened (`enum ibv_event_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AsyncEventKind {
    /// A completion queue overflowed or broke; its queue pairs are lost.
    CompletionQueueError,
    /// A queue pair broke and went to the error state.
    QueuePairFatal,
    /// A queue pair received a request it cannot serve.
    QueuePairRequestError,
    /// A queue pair refused a peer's access.
    QueuePairAccessError,
    /// The first packet arrived before the queue pair was ready to send.
    CommunicationEstablished,
    /// A send queue drained after a request to drain.
    SendQueueDrained,
    /// A connection moved to its alternate path.
    PathMigrated,
    /// A connection could not move to its alternate path.
    PathMigrationError,
    /// The device failed; everything made from it is lost.
    DeviceFatal,
    /// A port came up.
    PortActive,
    /// A port went down.
    PortError,
    /// The subnet manager changed a port's LID.
    LidChange,
    /// A partition key table changed.
    PartitionKeyChange,
    /// The subnet manager changed.
    SubnetManagerChange,
    /// A shared receive queue broke.
    SharedReceiveQueueError,
    /// A shared receive queue ran low.
    SharedReceiveQueueLimit,
    /// A queue pair of a shared receive queue took its last request.
    LastRequestReached,
    /// The subnet manager asks clients to register again.
    ClientReregister,
    /// A GID table changed.
    GidChange,
    /// A work queue broke.
    WorkQueueFatal,
    /// A kind that this version does not know, by number.
    Unknown(i32),
}

impl AsyncEventKind {
    fn from_raw(raw: i32) -> AsyncEventKind {
        match raw {
            IBV_EVENT_CQ_ERR => AsyncEventKind::CompletionQueueError,
            IBV_EVENT_QP_FATAL => AsyncEventKind::QueuePairFatal,
            IBV_EVENT_QP_REQ_ERR => AsyncEventKind::QueuePairRequestError,
            IBV_EVENT_QP_ACCESS_ERR => AsyncEventKind::QueuePairAccessError,
            IBV_EVENT_COMM_EST => AsyncEventKind::CommunicationEstablished,
            IBV_EVENT_SQ_DRAINED => AsyncEventKind::SendQueueDrained,
            IBV_EVENT_PATH_MIG => AsyncEventKind::PathMigrated,
            IBV_EVENT_PATH_MIG_ERR => AsyncEventKind::PathMigrationError,
            IBV_EVENT_DEVICE_FATAL => AsyncEventKind::DeviceFatal,
            IBV_EVENT_PORT_ACTIVE => AsyncEventKind::PortActive,
            IBV_EVENT_PORT_ERR => AsyncEventKind::PortError,
            IBV_EVENT_LID_CHANGE => AsyncEventKind::LidChange,
            IBV_EVENT_PKEY_CHANGE => AsyncEventKind::PartitionKeyChange,
            IBV_EVENT_SM_CHANGE => AsyncEventKind::SubnetManagerChange,
            IBV_EVENT_SRQ_ERR => AsyncEventKind::SharedReceiveQueueError,
            IBV_EVENT_SRQ_LIMIT_REACHED => AsyncEventKind::SharedReceiveQueueLimit,
            IBV_EVENT_QP_LAST_WQE_REACHED => AsyncEventKind::LastRequestReached,
            IBV_EVENT_CLIENT_REREGISTER => AsyncEventKind::ClientReregister,
            IBV_EVENT_GID_CHANGE => AsyncEventKind::GidChange,
            IBV_EVENT_WQ_FATAL => AsyncEventKind::WorkQueueFatal,
            unknown => AsyncEventKind::Unknown(unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_known_event_has_a_kind_of_its_own_and_the_rest_keep_their_number() {
        let kinds: HashSet<_> = (0..20).map(AsyncEventKind::from_raw).collect();
        assert_eq!(kinds.len(), 20);
        assert!(!kinds.iter().any(|kind| matches!(kind, AsyncEventKind::Unknown(_))));
        assert_eq!(AsyncEventKind::from_raw(20), AsyncEventKind::Unknown(20));
        assert_eq!(AsyncEventKind::from_raw(-1), AsyncEventKind::Unknown(-1));
    }
}

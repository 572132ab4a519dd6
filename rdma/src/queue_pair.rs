//! Reliable-connected queue pairs: their states and their posts.

use std::io;
use std::sync::Arc;

use crate::completion::CompletionQueue;
use crate::device::DeviceLimits;
use crate::endpoint::{Endpoint, NUMBER_MAX};
use crate::error::Error;
use crate::gid::{Gid, GidError};
use crate::library::Transport;
use crate::memory_region::MemoryRegion;
use crate::port::{LinkLayer, Mtu, Port};
use crate::protection_domain::ProtectionDomain;
use crate::sys;
use crate::sys::constants::{
    IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_DEST_QPN,
    IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU,
    IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN,
    IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_ERR, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS,
};
use crate::sys::queue_pair::blank_attributes;
use crate::sys::structs::{ibv_ah_attr, ibv_gid, ibv_qp_cap};
use crate::work::{PostError, Transfer, TransferError, WriteList};

/// The resources of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Writes, reads and immediates that may be outstanding. An unsignalled request stays outstanding until a
    /// later signalled one is taken from the completion queue.
    pub send_work_requests: u32,
    /// Receives that may be posted: immediates from the peer that may be in flight.
    pub receive_work_requests: u32,
    /// What the peer may do with the regions of the protection domain, as far as each allows it.
    pub peer_access: PeerAccess,
}

impl Default for Capacity {
    fn default() -> Capacity {
        Capacity { send_work_requests: 1024, receive_work_requests: 16, peer_access: PeerAccess::None }
    }
}

/// What the peer of a queue pair may do with regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PeerAccess {
    /// Nothing: the source of a migration. Immediates still arrive.
    #[default]
    None,
    /// Write: the destination.
    Write,
    /// Read: the source of a post-copy migration.
    Read,
}

/// How a connection behaves. The defaults suit a local network; the numbers are those of the InfiniBand
/// specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Time without an acknowledgement before a packet is sent again: 4.096 µs × 2^n, n from 1 to 31; 0 waits
    /// for ever. 14: 67 ms.
    pub ack_timeout: u8,
    /// How often a packet is sent again before the connection fails, at most 7.
    pub retry_count: u8,
    /// How often an immediate is retried against a peer without a posted receive; 7 retries for ever.
    pub receiver_not_ready_retry_count: u8,
    /// The delay that a peer without a posted receive asks the sender to wait (table 45 of the specification,
    /// 5 bits). 12: 0.64 ms.
    pub receiver_not_ready_timer: u8,
    /// How many routers a RoCE v2 packet may pass.
    pub hop_limit: u8,
    /// The traffic class of RoCE packets: DSCP × 4 + ECN.
    pub traffic_class: u8,
    /// The service level, which chooses an InfiniBand lane or a RoCE priority.
    pub service_level: u8,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            ack_timeout: 14,
            retry_count: 7,
            receiver_not_ready_retry_count: 7,
            receiver_not_ready_timer: 12,
            hop_limit: 64,
            traffic_class: 0,
            service_level: 0,
        }
    }
}

impl ConnectOptions {
    /// Refuses values that do not fit the packets' fields, because a device would truncate them.
    fn check(&self) -> Result<(), Error> {
        let bounds = [
            ("ack_timeout", self.ack_timeout, 31),
            ("retry_count", self.retry_count, 7),
            ("receiver_not_ready_retry_count", self.receiver_not_ready_retry_count, 7),
            ("receiver_not_ready_timer", self.receiver_not_ready_timer, 31),
            ("service_level", self.service_level, 15),
        ];
        match bounds.into_iter().find(|(_, value, limit)| value > limit) {
            Some((option, value, limit)) => Err(Error::ConnectOption { option, value, limit }),
            None => Ok(()),
        }
    }
}

/// A reliable connection, or its local end before [`connect`](Self::connect).
///
/// Writes of one queue pair reach the peer's memory in the order they were posted. Posting takes `&mut self`:
/// a queue pair belongs to one worker at a time, and can move to another thread.
///
/// A queue pair keeps every region from which it posted until the region is [released](Self::release) or the
/// queue pair dropped. Dropping the queue pair ends the peer's access through it.
#[derive(Debug)]
pub struct QueuePair {
    inner: sys::queue_pair::QueuePair,
    endpoint: Endpoint,
    capacity: Capacity,
    port: u8,
    gid_index: u8,
    reads_outstanding: u8,
    max_message_bytes: u32,
    connected: bool,
}

impl QueuePair {
    /// Creates a queue pair on `port` that sends from `gid`, and takes it to the state INIT, in which
    /// receives can be posted.
    ///
    /// # Errors
    /// [`Error::OverLimit`] for more requests than the device takes, [`Error::UnsupportedTransport`] on
    /// iWARP, [`Error::DifferentDevices`], [`Error::Gid`] for an index that no queue pair can name,
    /// [`Error::Call`] for the rest.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        port: &Port,
        gid: &Gid,
        send_completions: &Arc<CompletionQueue>,
        receive_completions: &Arc<CompletionQueue>,
        capacity: Capacity,
    ) -> Result<QueuePair, Error> {
        let device = domain.device();
        if device.info().transport != Transport::InfiniBand {
            let transport = device.info().transport.to_string();
            return Err(Error::UnsupportedTransport { device: device.name().to_owned(), transport });
        }
        let same = |queue: &CompletionQueue| Arc::ptr_eq(queue.device().context(), device.context());
        if !same(send_completions) || !same(receive_completions) {
            return Err(Error::DifferentDevices);
        }
        let limits = device.limits();
        DeviceLimits::check("send work requests", capacity.send_work_requests, limits.work_requests)?;
        DeviceLimits::check("receive work requests", capacity.receive_work_requests, limits.work_requests)?;
        let gid_index = u8::try_from(gid.index).map_err(|_| GidError::None { port: port.number })?;

        let mut raw_capacity = ibv_qp_cap {
            max_send_wr: capacity.send_work_requests.max(1),
            max_recv_wr: capacity.receive_work_requests.max(1),
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut inner = sys::queue_pair::QueuePair::create(
            domain.domain(),
            send_completions.completions(),
            receive_completions.completions(),
            &mut raw_capacity,
        )?;
        initialize(&mut inner, port.number, capacity.peer_access)?;

        let endpoint = Endpoint {
            queue_pair_number: inner.number(),
            packet_sequence_number: random_sequence_number()?,
            gid: gid.address,
            gid_kind: gid.kind,
            lid: port.lid,
            mtu_bytes: port.active_mtu.bytes(),
            link_layer: port.link_layer,
            reads_accepted: limits.reads_accepted,
        };
        Ok(QueuePair {
            inner,
            endpoint,
            capacity: Capacity {
                send_work_requests: raw_capacity.max_send_wr,
                receive_work_requests: raw_capacity.max_recv_wr,
                ..capacity
            },
            port: port.number,
            gid_index,
            reads_outstanding: limits.reads_outstanding,
            max_message_bytes: port.max_message_bytes,
            connected: false,
        })
    }

    /// What the peer needs to connect to this end.
    pub fn local_endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// The number that completions and events name.
    pub fn number(&self) -> u32 {
        self.endpoint.queue_pair_number
    }

    /// The capacity that the device granted: at least what the caller asked for.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The longest message of one request on its port.
    pub fn max_message_bytes(&self) -> u32 {
        self.max_message_bytes
    }

    /// Whether [`connect`](Self::connect) has succeeded.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Takes the queue pair to the states RTR and RTS, towards `peer`.
    ///
    /// The device drops earlier packets and the peer sends them again, so the two ends may connect in any
    /// order. An end that sends should still wait until it knows that the other has connected.
    ///
    /// # Errors
    /// [`Error::Endpoint`] and [`Error::ConnectOption`] for invalid values, checked before the device
    /// receives them; [`Error::AlreadyConnected`]; [`Error::Call`] when the device refuses, for example
    /// without a route to the peer's GID. After a refusal the queue pair is unusable.
    pub fn connect(&mut self, peer: &Endpoint, options: &ConnectOptions) -> Result<(), Error> {
        if self.connected {
            return Err(Error::AlreadyConnected);
        }
        options.check()?;
        let mtu = self.endpoint.check_peer(peer)?;
        self.ready_to_receive(peer, mtu, options)?;
        self.ready_to_send(peer, options)?;
        self.connected = true;
        Ok(())
    }

    /// Posts the writes of a list with one doorbell and empties it. Allocates nothing, unless it meets a
    /// region for the first time.
    ///
    /// # Errors
    /// [`PostError::Refused`] says how many writes were posted before the device refused. It also empties the
    /// list, and the caller should close the connection. Any other error posts nothing and leaves the list
    /// unchanged.
    pub fn post_writes(&mut self, list: &mut WriteList) -> Result<(), PostError> {
        self.check_connected()?;
        if !self.inner.accepts_all(list.requests()) {
            return Err(PostError::ForeignRegion);
        }
        self.check_message(list.longest_bytes())?;
        let requested = list.len();
        let result = self.inner.post_writes(list.requests());
        list.clear();
        result.map_err(|refused| PostError::Refused {
            posted: refused.posted,
            requested,
            source: refused.source,
        })
    }

    /// Posts a signalled write of no bytes. Its `immediate` appears in the peer's receive completions once
    /// everything posted before it is in place. The peer must have posted a receive.
    ///
    /// # Errors
    /// [`PostError::NotConnected`] or [`PostError::Refused`].
    pub fn post_write_immediate(&mut self, immediate: u32, id: u64) -> Result<(), PostError> {
        self.check_connected()?;
        self.inner.post_write_immediate(immediate, id).map_err(refused)
    }

    /// Posts a read of the peer's memory into a local region.
    ///
    /// # Errors
    /// [`PostError::Transfer`] when the read does not lie inside the region, or the region does not allow
    /// local writes; [`PostError::NotConnected`], [`PostError::ForeignRegion`] or [`PostError::Refused`].
    pub fn post_read(&mut self, read: Transfer<'_>) -> Result<(), PostError> {
        self.check_connected()?;
        let access = read.region.access();
        if !access.allows_local_write() {
            return Err(TransferError::NotWritable { access }.into());
        }
        let region = read.region.region();
        if !self.inner.accepts(region) {
            return Err(PostError::ForeignRegion);
        }
        let raw = read.check()?;
        self.check_message(raw.len_bytes)?;
        self.inner.post_read(region, &raw).map_err(refused)
    }

    /// Posts a receive without a buffer, for one immediate from the peer. Allowed before
    /// [`connect`](Self::connect), and best done then.
    ///
    /// # Errors
    /// [`PostError::Refused`] when the posted receives have reached the capacity.
    pub fn post_receive(&mut self, id: u64) -> Result<(), PostError> {
        self.inner.post_receive(id).map_err(refused)
    }

    /// Releases a region from which requests were posted, so that it can be deregistered while the queue pair
    /// lives. Call it once all of these requests have completed: a request still outstanding when the region
    /// is deregistered fails with [`LocalProtection`](crate::CompletionStatus::LocalProtection).
    pub fn release(&mut self, region: &MemoryRegion) {
        self.inner.release(region.region());
    }

    /// Destroys the queue pair, as dropping it does, for a caller that needs to know that it worked. After
    /// success the peer has no access through it.
    ///
    /// # Errors
    /// [`Error::Call`] when the device refuses; the peer may then still have access.
    pub fn destroy(self) -> Result<(), Error> {
        self.inner.destroy()
    }

    /// Takes the queue pair to the state ERR: it neither sends nor receives any more, and all outstanding
    /// requests complete as [`Flushed`](crate::CompletionStatus::Flushed).
    ///
    /// # Errors
    /// [`Error::Call`] when the device refuses; the caller can still drop the queue pair.
    pub fn close(&mut self) -> Result<(), Error> {
        let mut attributes = blank_attributes();
        attributes.qp_state = IBV_QPS_ERR;
        self.inner.modify(&mut attributes, IBV_QP_STATE)
    }

    fn ready_to_receive(&mut self, peer: &Endpoint, mtu: Mtu, options: &ConnectOptions) -> Result<(), Error> {
        let mut attributes = blank_attributes();
        attributes.qp_state = IBV_QPS_RTR;
        attributes.path_mtu = mtu.to_raw();
        attributes.dest_qp_num = peer.queue_pair_number;
        attributes.rq_psn = peer.packet_sequence_number;
        attributes.max_dest_rd_atomic = self.endpoint.reads_accepted;
        attributes.min_rnr_timer = options.receiver_not_ready_timer;
        attributes.ah_attr = self.route_to(peer, options);
        self.inner.modify(
            &mut attributes,
            IBV_QP_STATE
                | IBV_QP_AV
                | IBV_QP_PATH_MTU
                | IBV_QP_DEST_QPN
                | IBV_QP_RQ_PSN
                | IBV_QP_MAX_DEST_RD_ATOMIC
                | IBV_QP_MIN_RNR_TIMER,
        )
    }

    fn ready_to_send(&mut self, peer: &Endpoint, options: &ConnectOptions) -> Result<(), Error> {
        let mut attributes = blank_attributes();
        attributes.qp_state = IBV_QPS_RTS;
        attributes.sq_psn = self.endpoint.packet_sequence_number;
        attributes.timeout = options.ack_timeout;
        attributes.retry_cnt = options.retry_count;
        attributes.rnr_retry = options.receiver_not_ready_retry_count;
        attributes.max_rd_atomic = self.reads_outstanding.min(peer.reads_accepted);
        self.inner.modify(
            &mut attributes,
            IBV_QP_STATE
                | IBV_QP_SQ_PSN
                | IBV_QP_TIMEOUT
                | IBV_QP_RETRY_CNT
                | IBV_QP_RNR_RETRY
                | IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// InfiniBand is routed by LID within a subnet; RoCE has no LIDs and always carries the global header.
    fn route_to(&self, peer: &Endpoint, options: &ConnectOptions) -> ibv_ah_attr {
        let mut route = blank_attributes().ah_attr;
        route.port_num = self.port;
        route.sl = options.service_level;
        match self.endpoint.link_layer {
            LinkLayer::InfiniBand => route.dlid = peer.lid,
            LinkLayer::Ethernet => {
                route.is_global = 1;
                route.grh.dgid = ibv_gid::from_bytes(peer.gid);
                route.grh.sgid_index = self.gid_index;
                route.grh.hop_limit = options.hop_limit;
                route.grh.traffic_class = options.traffic_class;
            }
        }
        route
    }

    fn check_connected(&self) -> Result<(), PostError> {
        if self.connected { Ok(()) } else { Err(PostError::NotConnected) }
    }

    fn check_message(&self, len_bytes: u32) -> Result<(), TransferError> {
        if len_bytes > self.max_message_bytes {
            let (len_bytes, limit_bytes) = (len_bytes as usize, self.max_message_bytes as usize);
            return Err(TransferError::TooLong { len_bytes, limit_bytes });
        }
        Ok(())
    }
}

/// RESET to INIT.
fn initialize(
    queue_pair: &mut sys::queue_pair::QueuePair,
    port: u8,
    peer_access: PeerAccess,
) -> Result<(), Error> {
    let mut attributes = blank_attributes();
    attributes.qp_state = IBV_QPS_INIT;
    attributes.port_num = port;
    attributes.qp_access_flags = match peer_access {
        PeerAccess::None => 0,
        PeerAccess::Write => IBV_ACCESS_REMOTE_WRITE,
        PeerAccess::Read => IBV_ACCESS_REMOTE_READ,
    }
    .unsigned_abs();
    queue_pair.modify(&mut attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
}

/// Random, so that packets of an earlier connection, or guessed by an attacker, do not match.
fn random_sequence_number() -> Result<u32, Error> {
    Ok(getrandom::u32().map_err(Error::Random)? & NUMBER_MAX)
}

fn refused(source: io::Error) -> PostError {
    PostError::Refused { posted: 0, requested: 1, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_the_packets_cannot_hold_are_refused() {
        assert!(ConnectOptions::default().check().is_ok());
        let options = ConnectOptions { retry_count: 8, ..ConnectOptions::default() };
        assert!(matches!(
            options.check(),
            Err(Error::ConnectOption { option: "retry_count", value: 8, limit: 7 })
        ));
    }
}

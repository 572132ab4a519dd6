//! The structs of `<infiniband/verbs.h>` that Sterna passes or reads, under their C names and with their C
//! field names, so that a reader can compare them with the header. Enums are plain integers: a newer library
//! may return values that this file does not define, and an unknown value in a Rust enum would be undefined
//! behaviour.
//!
//! `witness/` compares the size of each struct and the offset of each field with the C header.

use std::ffi::{c_char, c_int, c_uint, c_void};

#[cfg(feature = "witness")]
use super::described::{Field, Layout};

/// Declares C structs and, from the same text, `layouts`: a description of each for the witnesses.
macro_rules! c_structs {
    ($(
        $(#[$attribute:meta])*
        struct $name:ident { $( $(#[$field_attribute:meta])* $field:ident : $type:ty, )+ }
    )+) => {
        $(
            $(#[$attribute])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub(crate) struct $name { $( $(#[$field_attribute])* pub(crate) $field: $type, )+ }
        )+

        /// Every struct of this file: its C name, size, alignment and fields.
        #[cfg(feature = "witness")]
        pub(crate) fn layouts() -> Vec<Layout> {
            vec![$( Layout {
                name: stringify!($name),
                size_bytes: size_of::<$name>(),
                align_bytes: align_of::<$name>(),
                fields: vec![$( Field {
                    name: stringify!($field),
                    offset_bytes: std::mem::offset_of!($name, $field),
                } ),+],
            } ),+]
        }
    };
}

c_structs! {
    /// Allocated by the library; valid until the list it came from is freed, unless opened.
    struct ibv_device {
        _ops: [*mut c_void; 2],
        node_type: c_int,
        transport_type: c_int,
        name: [c_char; 64],
        dev_name: [c_char; 64],
        dev_path: [c_char; 256],
        ibdev_path: [c_char; 256],
    }

    /// The provider's entry points. This crate calls only the four of the data path through them, as the
    /// header's inline functions do.
    struct ibv_context_ops {
        _compat_query_device: *mut c_void,
        _compat_query_port: *mut c_void,
        _compat_alloc_pd: *mut c_void,
        _compat_dealloc_pd: *mut c_void,
        _compat_reg_mr: *mut c_void,
        _compat_rereg_mr: *mut c_void,
        _compat_dereg_mr: *mut c_void,
        alloc_mw: *mut c_void,
        bind_mw: *mut c_void,
        dealloc_mw: *mut c_void,
        _compat_create_cq: *mut c_void,
        poll_cq: unsafe extern "C" fn(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int,
        req_notify_cq: unsafe extern "C" fn(cq: *mut ibv_cq, solicited_only: c_int) -> c_int,
        _compat_cq_event: *mut c_void,
        _compat_resize_cq: *mut c_void,
        _compat_destroy_cq: *mut c_void,
        _compat_create_srq: *mut c_void,
        _compat_modify_srq: *mut c_void,
        _compat_query_srq: *mut c_void,
        _compat_destroy_srq: *mut c_void,
        post_srq_recv: *mut c_void,
        _compat_create_qp: *mut c_void,
        _compat_query_qp: *mut c_void,
        _compat_modify_qp: *mut c_void,
        _compat_destroy_qp: *mut c_void,
        post_send: unsafe extern "C" fn(
            qp: *mut ibv_qp,
            wr: *mut ibv_send_wr,
            bad_wr: *mut *mut ibv_send_wr,
        ) -> c_int,
        post_recv: unsafe extern "C" fn(
            qp: *mut ibv_qp,
            wr: *mut ibv_recv_wr,
            bad_wr: *mut *mut ibv_recv_wr,
        ) -> c_int,
        _compat_create_ah: *mut c_void,
        _compat_destroy_ah: *mut c_void,
        _compat_attach_mcast: *mut c_void,
        _compat_detach_mcast: *mut c_void,
        _compat_async_event: *mut c_void,
    }

    /// An open device. Allocated by the library.
    struct ibv_context {
        device: *mut ibv_device,
        ops: ibv_context_ops,
        cmd_fd: c_int,
        async_fd: c_int,
        num_comp_vectors: c_int,
        mutex: libc::pthread_mutex_t,
        abi_compat: *mut c_void,
    }

    struct ibv_device_attr {
        fw_ver: [c_char; 64],
        /// Big-endian.
        node_guid: u64,
        /// Big-endian.
        sys_image_guid: u64,
        max_mr_size: u64,
        page_size_cap: u64,
        vendor_id: u32,
        vendor_part_id: u32,
        hw_ver: u32,
        max_qp: c_int,
        max_qp_wr: c_int,
        device_cap_flags: c_uint,
        max_sge: c_int,
        max_sge_rd: c_int,
        max_cq: c_int,
        max_cqe: c_int,
        max_mr: c_int,
        max_pd: c_int,
        max_qp_rd_atom: c_int,
        max_ee_rd_atom: c_int,
        max_res_rd_atom: c_int,
        max_qp_init_rd_atom: c_int,
        max_ee_init_rd_atom: c_int,
        atomic_cap: c_uint,
        max_ee: c_int,
        max_rdd: c_int,
        max_mw: c_int,
        max_raw_ipv6_qp: c_int,
        max_raw_ethy_qp: c_int,
        max_mcast_grp: c_int,
        max_mcast_qp_attach: c_int,
        max_total_mcast_qp_attach: c_int,
        max_ah: c_int,
        max_fmr: c_int,
        max_map_per_fmr: c_int,
        max_srq: c_int,
        max_srq_wr: c_int,
        max_srq_sge: c_int,
        max_pkeys: u16,
        local_ca_ack_delay: u8,
        phys_port_cnt: u8,
    }

    /// The exported `ibv_query_port` fills this struct up to `flags` and never more, whatever newer headers
    /// append. The extended call, which Sterna does not use, fills `port_cap_flags2` and what follows.
    struct ibv_port_attr {
        state: c_uint,
        max_mtu: c_uint,
        active_mtu: c_uint,
        gid_tbl_len: c_int,
        port_cap_flags: u32,
        max_msg_sz: u32,
        bad_pkey_cntr: u32,
        qkey_viol_cntr: u32,
        pkey_tbl_len: u16,
        lid: u16,
        sm_lid: u16,
        lmc: u8,
        max_vl_num: u8,
        sm_sl: u8,
        subnet_timeout: u8,
        init_type_reply: u8,
        active_width: u8,
        active_speed: u8,
        phys_state: u8,
        link_layer: u8,
        flags: u8,
        port_cap_flags2: u16,
    }

    struct ibv_gid {
        raw: [u64; 2],
    }

    struct ibv_gid_entry {
        gid: ibv_gid,
        gid_index: u32,
        port_num: u32,
        gid_type: u32,
        ndev_ifindex: u32,
    }

    /// Allocated by the library.
    struct ibv_pd {
        context: *mut ibv_context,
        handle: u32,
    }

    /// Allocated by the library.
    struct ibv_mr {
        context: *mut ibv_context,
        pd: *mut ibv_pd,
        addr: *mut c_void,
        length: usize,
        handle: u32,
        lkey: u32,
        rkey: u32,
    }

    /// Allocated by the library.
    struct ibv_comp_channel {
        context: *mut ibv_context,
        fd: c_int,
        refcnt: c_int,
    }

    /// Allocated by the library.
    struct ibv_cq {
        context: *mut ibv_context,
        channel: *mut ibv_comp_channel,
        cq_context: *mut c_void,
        handle: u32,
        cqe: c_int,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        comp_events_completed: u32,
        async_events_completed: u32,
    }

    struct ibv_wc {
        wr_id: u64,
        status: c_uint,
        opcode: c_uint,
        vendor_err: u32,
        byte_len: u32,
        /// Big-endian; in a union with `invalidated_rkey`.
        imm_data: u32,
        qp_num: u32,
        src_qp: u32,
        wc_flags: c_uint,
        pkey_index: u16,
        slid: u16,
        sl: u8,
        dlid_path_bits: u8,
    }

    /// Allocated by the library.
    struct ibv_qp {
        context: *mut ibv_context,
        qp_context: *mut c_void,
        pd: *mut ibv_pd,
        send_cq: *mut ibv_cq,
        recv_cq: *mut ibv_cq,
        srq: *mut c_void,
        handle: u32,
        qp_num: u32,
        state: c_uint,
        qp_type: c_uint,
        mutex: libc::pthread_mutex_t,
        cond: libc::pthread_cond_t,
        events_completed: u32,
    }

    struct ibv_qp_cap {
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline_data: u32,
    }

    struct ibv_qp_init_attr {
        qp_context: *mut c_void,
        send_cq: *mut ibv_cq,
        recv_cq: *mut ibv_cq,
        srq: *mut c_void,
        cap: ibv_qp_cap,
        qp_type: c_uint,
        sq_sig_all: c_int,
    }

    struct ibv_global_route {
        dgid: ibv_gid,
        flow_label: u32,
        sgid_index: u8,
        hop_limit: u8,
        traffic_class: u8,
    }

    struct ibv_ah_attr {
        grh: ibv_global_route,
        dlid: u16,
        sl: u8,
        src_path_bits: u8,
        static_rate: u8,
        is_global: u8,
        port_num: u8,
    }

    struct ibv_qp_attr {
        qp_state: c_uint,
        cur_qp_state: c_uint,
        path_mtu: c_uint,
        path_mig_state: c_uint,
        qkey: u32,
        rq_psn: u32,
        sq_psn: u32,
        dest_qp_num: u32,
        qp_access_flags: c_uint,
        cap: ibv_qp_cap,
        ah_attr: ibv_ah_attr,
        alt_ah_attr: ibv_ah_attr,
        pkey_index: u16,
        alt_pkey_index: u16,
        en_sqd_async_notify: u8,
        sq_draining: u8,
        max_rd_atomic: u8,
        max_dest_rd_atomic: u8,
        min_rnr_timer: u8,
        port_num: u8,
        timeout: u8,
        retry_cnt: u8,
        rnr_retry: u8,
        alt_port_num: u8,
        alt_timeout: u8,
        rate_limit: u32,
    }

    struct ibv_sge {
        addr: u64,
        length: u32,
        lkey: u32,
    }

    /// The `rdma` member of `ibv_send_wr`'s union `wr`, filled up to the size of its largest member,
    /// `atomic`.
    struct ibv_send_wr_rdma {
        remote_addr: u64,
        rkey: u32,
        _atomic: [u32; 5],
    }

    struct ibv_send_wr {
        wr_id: u64,
        next: *mut ibv_send_wr,
        sg_list: *mut ibv_sge,
        num_sge: c_int,
        opcode: c_uint,
        send_flags: c_uint,
        /// Big-endian; in a union with `invalidate_rkey`.
        imm_data: u32,
        wr: ibv_send_wr_rdma,
        qp_type: u32,
        /// The union of `bind_mw` and `tso`.
        _bind_or_tso: [u64; 6],
    }

    struct ibv_recv_wr {
        wr_id: u64,
        next: *mut ibv_recv_wr,
        sg_list: *mut ibv_sge,
        num_sge: c_int,
    }

    struct ibv_async_event {
        /// A union of pointers and an `int` port number.
        element: *mut c_void,
        event_type: c_int,
    }
}

impl ibv_gid {
    /// The union's other view: 16 bytes in network order.
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.raw[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&self.raw[1].to_ne_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> ibv_gid {
        let half = |start: usize| {
            let mut half = [0; 8];
            half.copy_from_slice(&bytes[start..start + 8]);
            u64::from_ne_bytes(half)
        };
        ibv_gid { raw: [half(0), half(8)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes on 64-bit Linux, from the header of rdma-core 44. The library lays these structs out in its
    /// own memory or reads this crate's; `witness/` compares every field.
    #[test]
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn sizes_are_those_of_the_header() {
        let sizes = [
            ("ibv_device", size_of::<ibv_device>(), 664),
            ("ibv_context_ops", size_of::<ibv_context_ops>(), 256),
            ("ibv_context", size_of::<ibv_context>(), 328),
            ("ibv_device_attr", size_of::<ibv_device_attr>(), 232),
            ("ibv_port_attr", size_of::<ibv_port_attr>(), 52),
            ("ibv_gid", size_of::<ibv_gid>(), 16),
            ("ibv_gid_entry", size_of::<ibv_gid_entry>(), 32),
            ("ibv_pd", size_of::<ibv_pd>(), 16),
            ("ibv_mr", size_of::<ibv_mr>(), 48),
            ("ibv_comp_channel", size_of::<ibv_comp_channel>(), 16),
            ("ibv_cq", size_of::<ibv_cq>(), 128),
            ("ibv_wc", size_of::<ibv_wc>(), 48),
            ("ibv_qp", size_of::<ibv_qp>(), 160),
            ("ibv_qp_cap", size_of::<ibv_qp_cap>(), 20),
            ("ibv_qp_init_attr", size_of::<ibv_qp_init_attr>(), 64),
            ("ibv_global_route", size_of::<ibv_global_route>(), 24),
            ("ibv_ah_attr", size_of::<ibv_ah_attr>(), 32),
            ("ibv_qp_attr", size_of::<ibv_qp_attr>(), 144),
            ("ibv_sge", size_of::<ibv_sge>(), 16),
            ("ibv_send_wr_rdma", size_of::<ibv_send_wr_rdma>(), 32),
            ("ibv_send_wr", size_of::<ibv_send_wr>(), 128),
            ("ibv_recv_wr", size_of::<ibv_recv_wr>(), 32),
            ("ibv_async_event", size_of::<ibv_async_event>(), 16),
        ];
        for (name, ours, theirs) in sizes {
            assert_eq!(ours, theirs, "{name}");
        }
    }

    #[test]
    fn a_gid_keeps_its_bytes_in_order() {
        let bytes: [u8; 16] = std::array::from_fn(|index| index.to_le_bytes()[0]);
        assert_eq!(ibv_gid::from_bytes(bytes).bytes(), bytes);
    }
}

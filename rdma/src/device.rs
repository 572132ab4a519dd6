//! An open device.

use std::ffi::c_int;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::events::AsyncEvent;
use crate::gid::{Gid, GidKind};
use crate::library::{self, DeviceInfo, Library};
use crate::port::Port;
use crate::sys::context::Context;
use crate::sys::os;
use crate::sys::structs::ibv_device_attr;

/// An open device: the root of protection domains, completion queues and all objects made from them.
#[derive(Debug)]
pub struct Device {
    info: DeviceInfo,
    limits: DeviceLimits,
    context: Arc<Context>,
}

impl Device {
    /// Opens the device with this kernel name.
    ///
    /// # Errors
    /// Those of [`Library::devices`]; [`Error::NoSuchDevice`]; [`Error::Open`], for example without
    /// permission on `/dev/infiniband`.
    pub fn open(library: &Library, name: &str) -> Result<Arc<Device>, Error> {
        let list = library.list()?;
        let Some(index) = (0..list.len()).find(|&index| list.name(index) == name) else {
            let available = (0..list.len()).map(|index| list.name(index)).collect::<Vec<_>>().join(", ");
            return Err(Error::NoSuchDevice { name: name.to_owned(), available });
        };
        let info = library::describe(&list, index);
        let context = list.open(index)?;
        let limits = DeviceLimits::from_raw(&context.query_device()?);
        Ok(Arc::new(Device { info, limits, context }))
    }

    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// The device's properties as listed before it was opened.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The device's limits on objects and requests.
    pub fn limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// The ports as they are now, with their GIDs.
    ///
    /// # Errors
    /// [`Error::Call`] when a query fails.
    pub fn ports(&self) -> Result<Vec<Port>, Error> {
        let numbers = 1..=self.limits.ports;
        let ports = numbers
            .map(|number| Ok((number, self.context.query_port(number)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        let entries_max = ports.iter().map(|(_, raw)| usize::try_from(raw.gid_tbl_len).unwrap_or(0)).sum();
        let entries = self.context.gid_entries(entries_max)?;
        let gids_of = |number: u8| {
            let own = entries.iter().filter(|entry| entry.port_num == u32::from(number));
            own.map(|entry| Gid {
                index: entry.gid_index,
                kind: GidKind::from_raw(entry.gid_type),
                address: entry.gid.bytes(),
            })
            .collect()
        };
        Ok(ports.iter().map(|(number, raw)| Port::from_raw(*number, raw, gids_of(*number))).collect())
    }

    /// The next asynchronous event, waited for up to `timeout`; `None` when none came.
    ///
    /// Such an event reports what no completion can: a port going down, a failure of the device. Soft-RoCE
    /// reports fewer events than an adapter, so the peer must also report its errors over the control
    /// channel.
    ///
    /// # Errors
    /// [`Error::Call`] when the device's event queue cannot be read.
    pub fn poll_event(&self, timeout: Duration) -> Result<Option<AsyncEvent>, Error> {
        let readable = os::wait_readable(self.context.async_fd(), timeout);
        if !readable.map_err(|source| Error::Call { call: "poll", source })? {
            return Ok(None);
        }
        Ok(self.context.next_event()?.map(|raw| AsyncEvent::from_raw(&raw)))
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

/// A device's limits on objects and requests. A driver's negative value counts as zero.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// The number of ports.
    pub ports: u8,
    /// PCI vendor of the adapter; 0xffffff for soft-RoCE.
    pub vendor_id: u32,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Work requests in one queue of a queue pair.
    pub work_requests: u32,
    /// Completion queues.
    pub completion_queues: u32,
    /// Completions in one queue.
    pub completions: u32,
    /// Memory regions.
    pub memory_regions: u32,
    /// Bytes of one memory region.
    pub memory_region_bytes: u64,
    /// Protection domains.
    pub protection_domains: u32,
    /// Reads that a peer may have outstanding against one queue pair.
    pub reads_accepted: u8,
    /// Reads that one queue pair may have outstanding.
    pub reads_outstanding: u8,
}

impl DeviceLimits {
    fn from_raw(raw: &ibv_device_attr) -> DeviceLimits {
        let count = |value: c_int| u32::try_from(value).unwrap_or(0);
        let small = |value: c_int| u8::try_from(value.clamp(0, 255)).unwrap_or(0);
        DeviceLimits {
            ports: raw.phys_port_cnt,
            vendor_id: raw.vendor_id,
            queue_pairs: count(raw.max_qp),
            work_requests: count(raw.max_qp_wr),
            completion_queues: count(raw.max_cq),
            completions: count(raw.max_cqe),
            memory_regions: count(raw.max_mr),
            memory_region_bytes: raw.max_mr_size,
            protection_domains: count(raw.max_pd),
            reads_accepted: small(raw.max_qp_rd_atom),
            reads_outstanding: small(raw.max_qp_init_rd_atom),
        }
    }

    /// Refuses a value above the device's limit before the device does, so that the error names the limit.
    pub(crate) fn check(what: &'static str, asked: u32, limit: u32) -> Result<(), Error> {
        if asked > limit {
            return Err(Error::OverLimit { what, asked: asked.into(), limit: limit.into() });
        }
        Ok(())
    }
}

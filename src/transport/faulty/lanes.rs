//! The source's end.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sterna_rdma::CompletionStatus;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::faults::{FenceFault, LaneFaults, WriteFault, completed_with};
use super::registration::FaultyRegistration;
use crate::control::ControlChannel;
use crate::memory::{GuestRam, PAGE_BYTES, PageRun};
use crate::transport::error::TransportError;
use crate::transport::lane::{Lane, Registration, Transport};
use crate::transport::provider::SourceOffer;
use crate::transport::rdma::RdmaProvider;
use crate::transport::tcp::TcpLane;
use crate::wire::Token;

/// Faulty lanes before they are connected.
#[derive(Debug)]
pub(super) struct FaultyOffer {
    scheme: &'static str,
    lanes: u8,
    faults: Arc<LaneFaults>,
}

impl FaultyOffer {
    pub(super) fn new(scheme: &'static str, lanes: u8, faults: Arc<LaneFaults>) -> Self {
        Self { scheme, lanes, faults }
    }
}

impl SourceOffer for FaultyOffer {
    fn lanes(&self) -> u8 {
        self.lanes
    }

    fn body(&self) -> Result<Vec<u8>, TransportError> {
        Ok(Vec::new())
    }

    fn connect(
        self: Box<Self>,
        ready: &[u8],
        control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        let Self { scheme, lanes, faults } = *self;
        let token = Token(ready.try_into().expect("the faulty receiver says a token"));
        let registration =
            faults.registers.then(|| Arc::new(FaultyRegistration::new(ram.layout(), faults.clone())));
        let connect = |lane: u8| {
            let tcp = TcpLane::connect(control, lane, token, ram.clone())?;
            Ok(Box::new(FaultyLane {
                index: lane.into(),
                passes_for_rdma: scheme == RdmaProvider::SCHEME,
                tcp,
                ram: ram.clone(),
                faults: faults.clone(),
                registration: registration.clone(),
                late: Vec::new(),
                old: Vec::new(),
            }) as Box<dyn Lane>)
        };
        let lanes = (0..lanes).map(connect).collect::<Result<_, TransportError>>()?;
        // After the connection, so that the destination does not wait for TCP connections: for RDMA it would
        // wait for none.
        faults.connect.strike()?;
        Ok(Box::new(FaultyTransport { lanes, registration }))
    }
}

#[derive(Debug)]
struct FaultyTransport {
    lanes: Vec<Box<dyn Lane>>,
    registration: Option<Arc<FaultyRegistration>>,
}

impl Transport for FaultyTransport {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    fn via(&self) -> String {
        "lanes that fail as a test tells them to".into()
    }

    fn begin_round(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>) {
        let registration = self.registration.as_deref();
        registration.inspect(|registration| registration.begin());
        (&mut self.lanes, registration.map(|registration| registration as &dyn Registration))
    }
}

#[derive(Debug)]
struct FaultyLane {
    index: usize,
    passes_for_rdma: bool,
    tcp: TcpLane,
    ram: GuestRam,
    faults: Arc<LaneFaults>,
    registration: Option<Arc<FaultyRegistration>>,
    /// Writes that leave later, and after how many other writes.
    late: Vec<(PageRun, u32)>,
    /// Copies of pages, each as a lane that reads from other RAM.
    old: Vec<(PageRun, TcpLane)>,
}

impl FaultyLane {
    /// Writes these pages, and then the delayed writes that are due.
    fn pass(&mut self, run: PageRun) -> Result<(), TransportError> {
        self.tcp.write(run)?;
        for (_, left) in &mut self.late {
            *left = left.saturating_sub(1);
        }
        let due = |(run, left): &(PageRun, u32)| (*left == 0).then_some(*run);
        let now: Vec<_> = self.late.iter().filter_map(due).collect();
        self.late.retain(|(_, left)| *left > 0);
        now.into_iter().try_for_each(|run| self.tcp.write(run))
    }

    /// Keeps a copy of pages.
    fn keep_old(&mut self, run: PageRun) -> Result<(), TransportError> {
        let layout = self.ram.layout();
        let region = |region: &crate::memory::RegionLayout| {
            (GuestAddress(region.guest_address), usize::try_from(region.len_bytes).expect("it is in memory"))
        };
        let copy: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&layout.regions.iter().map(region).collect::<Vec<_>>())
                .expect("there is memory for a copy");
        let pages = self.ram.slice(run)?;
        let mut bytes = vec![0; pages.len()];
        pages.copy_to(&mut bytes);
        let at = layout.regions[run.region].guest_address + run.first_page * PAGE_BYTES;
        copy.write_slice(&bytes, GuestAddress(at)).expect("the copy is as large");
        let lane = self.tcp.out_of(GuestRam::from_vm_memory(&copy)?);
        self.old.push((run, lane.expect("there are file descriptors")));
        Ok(())
    }

    fn write_old(&mut self, round: u32) -> Result<(), TransportError> {
        self.old.drain(..).try_for_each(|(run, mut lane)| {
            lane.write(run)?;
            lane.fence(round)
        })
    }

    fn try_write(&mut self, run: PageRun) -> Result<(), TransportError> {
        if let Some(registration) = &self.registration {
            registration.wait()?;
        }
        match self.faults.strike(&self.faults.writes, self.index) {
            Some(WriteFault::Drop) => return Ok(()),
            Some(WriteFault::Late(writes)) => {
                self.late.push((run, writes));
                return Ok(());
            }
            Some(WriteFault::Fail(status)) => return Err(completed_with(self.index, status)),
            Some(WriteFault::Delay(time)) => thread::sleep(time),
            Some(WriteFault::Repeat) => self.pass(run)?,
            Some(WriteFault::KeepOld) => self.keep_old(run)?,
            Some(WriteFault::Meet(others)) => {
                others.wait();
            }
            Some(WriteFault::Cut) => self.tcp.cut(),
            Some(WriteFault::Panic) => panic!("a defect for a test"),
            None => {}
        }
        self.pass(run)
    }

    fn try_fence(&mut self, round: u32) -> Result<(), TransportError> {
        let fault = self.faults.strike(&self.faults.fences, self.index);
        match &fault {
            Some(FenceFault::Drop) => return Ok(()),
            Some(FenceFault::Fail(status)) => return Err(completed_with(self.index, *status)),
            Some(FenceFault::Delay(time)) => thread::sleep(*time),
            Some(FenceFault::Cut) => self.tcp.cut(),
            Some(FenceFault::Panic) => panic!("a defect for a test"),
            Some(FenceFault::Repeat | FenceFault::WriteOld | FenceFault::CutAfter) | None => {}
        }
        let late = std::mem::take(&mut self.late);
        late.into_iter().try_for_each(|(run, _)| self.tcp.write(run))?;
        self.tcp.fence(round)?;
        match fault {
            Some(FenceFault::Repeat) => self.tcp.fence(round)?,
            Some(FenceFault::WriteOld) => self.write_old(round)?,
            Some(FenceFault::CutAfter) => self.tcp.cut(),
            _ => {}
        }
        Ok(())
    }

    /// A device's error about a peer that has gone: no answer, after all retries.
    fn as_its_name_says(&self, error: TransportError) -> TransportError {
        match error {
            TransportError::Stream { lane, .. } | TransportError::Closed { lane } if self.passes_for_rdma => {
                completed_with(lane, CompletionStatus::RetryExceeded)
            }
            error => error,
        }
    }
}

impl Lane for FaultyLane {
    fn write(&mut self, run: PageRun) -> Result<(), TransportError> {
        self.try_write(run).map_err(|error| self.as_its_name_says(error))
    }

    fn fence(&mut self, round: u32) -> Result<(), TransportError> {
        self.try_fence(round).map_err(|error| self.as_its_name_says(error))
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

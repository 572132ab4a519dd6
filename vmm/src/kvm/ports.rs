//! The serial console, COM1.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::error::MachineError;
use crate::guest::payload::PORT_SERIAL;
use crate::kvm::error::refused;
use crate::poison::IgnorePoison;

/// The serial port takes eight ports.
pub(super) const PORTS_SERIAL: std::ops::Range<u16> = PORT_SERIAL..PORT_SERIAL + 8;

const IRQ_SERIAL: u32 = 4;
/// How much of the guest's output is kept.
const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// A 16550A on IRQ 4, and the guest's output to it.
#[derive(Debug)]
pub(crate) struct Console {
    serial: Mutex<Serial<Interrupt, NoEvents, Output>>,
    interrupt: Arc<EventFd>,
    output: Output,
}

/// The registers of the serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConsoleState(#[serde(with = "SerialFields")] SerialState);

/// The fields of [`SerialState`], which cannot be serialised itself.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct SerialFields {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl Console {
    pub(crate) fn new(vm: &VmFd) -> Result<Self, MachineError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| MachineError::Kvm { doing: "make an eventfd".to_owned(), source })?;
        vm.register_irqfd(&event, IRQ_SERIAL).map_err(refused("connect the serial interrupt"))?;
        let (interrupt, output) = (Arc::new(event), Output::default());
        let serial = Mutex::new(Serial::new(Interrupt(Arc::clone(&interrupt)), output.clone()));
        Ok(Self { serial, interrupt, output })
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.serial().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        // Neither the output nor the interrupt can fail in a way that concerns the guest.
        if let Err(error) = self.serial().write(register, value) {
            tracing::debug!("serial port: {error}");
        }
    }

    pub(crate) fn output(&self) -> Vec<u8> {
        self.output.bytes().iter().copied().collect()
    }

    pub(crate) fn save(&self) -> ConsoleState {
        ConsoleState(self.serial().state())
    }

    pub(crate) fn load(&self, ConsoleState(state): &ConsoleState) -> Result<(), MachineError> {
        let interrupt = Interrupt(Arc::clone(&self.interrupt));
        *self.serial() = Serial::from_state(state, interrupt, NoEvents, self.output.clone())
            .map_err(|error| MachineError::State { reason: format!("serial port: {error}") })?;
        Ok(())
    }

    fn serial(&self) -> MutexGuard<'_, Serial<Interrupt, NoEvents, Output>> {
        self.serial.lock().ignore_poison()
    }
}

/// The serial port's way to raise its interrupt.
#[derive(Debug)]
struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The end of the guest's output.
#[derive(Clone, Debug, Default)]
struct Output(Arc<Mutex<VecDeque<u8>>>);

impl Output {
    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().ignore_poison()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.bytes();
        kept.extend(bytes);
        let surplus = kept.len().saturating_sub(OUTPUT_BYTES_MAX);
        kept.drain(..surplus);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

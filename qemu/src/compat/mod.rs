//! Whether a guest can move from one QEMU to another, before anything is sent.

mod block;
mod cpu;
mod description;
mod devices;
mod differences;
mod places;
mod readiness;
mod refused_devices;

pub use self::block::Block;
pub use self::cpu::{Cpu, CpuValue};
pub use self::description::{DESCRIPTION_MAX, Description, DescriptionError};
pub use self::devices::Device;
pub use self::readiness::{End, Readiness, Refused, readiness};

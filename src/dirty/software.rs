use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::{DirtyError, DirtyLog};

/// What the VMM's own threads write through `vm-memory`, whose bitmap marks each page they touch.
///
/// That bitmap is always on; starting only forgets what it has so far.
#[derive(Clone, Debug)]
pub struct SoftwareLog {
    memory: GuestMemoryMmap<AtomicBitmap>,
}

impl SoftwareLog {
    /// The log of a guest whose regions are those of its [`GuestRam`](crate::memory::GuestRam), in the same order.
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap<AtomicBitmap>) -> Self {
        Self { memory: memory.clone() }
    }
}

impl DirtyLog for SoftwareLog {
    fn start(&self) -> Result<(), DirtyError> {
        for region in self.memory.iter() {
            (**region).bitmap().reset();
        }
        Ok(())
    }

    fn harvest(&self, region: usize, bits: &mut [u64]) -> Result<(), DirtyError> {
        let out_of_range = DirtyError::OutOfRange { region, first_page: 0, words: bits.len() };
        let region = self.memory.iter().nth(region).ok_or(out_of_range)?;
        // Consumed here and not at `rearm`: this comes before any page is read, which is all that the discipline asks.
        for (bits, written) in bits.iter_mut().zip((**region).bitmap().get_and_reset()) {
            *bits |= written;
        }
        Ok(())
    }

    fn rearm(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Two logs of the same guest: a page is dirty if either says so.
#[derive(Debug)]
pub struct EitherLog<A, B>(pub A, pub B);

impl<A: DirtyLog, B: DirtyLog> DirtyLog for EitherLog<A, B> {
    fn start(&self) -> Result<(), DirtyError> {
        self.0.start()?;
        self.1.start()
    }

    fn harvest(&self, region: usize, bits: &mut [u64]) -> Result<(), DirtyError> {
        self.0.harvest(region, bits)?;
        self.1.harvest(region, bits)
    }

    fn rearm(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        self.0.rearm(region, first_page, bits)?;
        self.1.rearm(region, first_page, bits)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.0.stop().and(self.1.stop())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn each_write_is_harvested_once_and_earlier_bits_stay() {
        let memory: GuestMemoryMmap<AtomicBitmap> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 100 * 4096)]).unwrap();
        let log = SoftwareLog::new(&memory);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        log.start().unwrap();
        memory.write_obj(1u8, GuestAddress(70 * 4096 - 1)).unwrap();
        memory.write_obj(1u8, GuestAddress(70 * 4096)).unwrap();
        let mut bits = [1 << 8, 0];
        log.harvest(0, &mut bits).unwrap();
        assert_eq!(bits, [1 << 8, 0b11 << 5]);
        log.harvest(0, &mut bits).unwrap();
        assert_eq!(bits, [1 << 8, 0b11 << 5]);
        assert!(matches!(log.harvest(1, &mut bits), Err(DirtyError::OutOfRange { .. })));
    }
}

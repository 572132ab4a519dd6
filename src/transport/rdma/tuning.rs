/// How a lane posts its writes, and how much RAM may be pinned. The defaults are measured:
/// `bench/benches/rdma.rs` compares them with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RdmaTuning {
    /// The longest write, in bytes: a multiple of the page size. Longer ones gain nothing, and lose more to a
    /// lost packet.
    pub write_max_bytes: u64,
    /// How many writes make a list, which is posted with one doorbell.
    pub list_writes: u32,
    /// One write in this many is signalled: each signal wakes the lane. A signal also goes with every half of
    /// `window_bytes`, so that one half is in flight while the lane wakes up for the other.
    pub signal_writes: u32,
    /// How many bytes may be in flight on one lane: at least twice bandwidth × round trip.
    pub window_bytes: u64,
    /// How many writes may be outstanding on one lane, as far as the device allows.
    pub window_writes: u32,
    /// How much RAM may be registered, and so pinned, at once at this end; `None`: as much as
    /// `RLIMIT_MEMLOCK` and the available memory allow. A larger guest has its chunks registered in turn, and
    /// the least recently used are evicted first.
    pub pin_max_bytes: Option<u64>,
}

impl RdmaTuning {
    /// How many bytes make a list, if its writes are long.
    pub const LIST_MAX_BYTES: u64 = 4 << 20;

    /// The same within the device's limit, so that several signals fit the window and several lists a signal.
    #[must_use]
    pub(super) fn within(self, device_writes: u32) -> Self {
        let window_writes = self.window_writes.clamp(8, device_writes.max(8));
        let signal_writes = self.signal_writes.clamp(1, window_writes / 4);
        Self {
            write_max_bytes: self.write_max_bytes.max(crate::memory::PAGE_BYTES),
            list_writes: self.list_writes.clamp(1, signal_writes),
            signal_writes,
            window_bytes: self.window_bytes.max(2 * Self::LIST_MAX_BYTES),
            window_writes,
            ..self
        }
    }
}

impl Default for RdmaTuning {
    fn default() -> Self {
        Self {
            write_max_bytes: 1 << 20,
            list_writes: 128,
            signal_writes: 256,
            // More than 400 Gb/s × 100 µs × 2.
            window_bytes: 16 << 20,
            window_writes: 1024,
            pin_max_bytes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_device_still_gets_several_signals_a_window() {
        let small = RdmaTuning::default().within(16);
        assert_eq!((small.window_writes, small.signal_writes, small.list_writes), (16, 4, 4));
        assert_eq!(RdmaTuning::default().within(1 << 20), RdmaTuning::default());
    }

    #[test]
    fn no_setting_leaves_a_lane_without_room() {
        let nothing = RdmaTuning {
            write_max_bytes: 0,
            list_writes: 0,
            signal_writes: 0,
            window_bytes: 0,
            window_writes: 0,
            pin_max_bytes: None,
        };
        let least = nothing.within(0);
        assert_eq!((least.window_writes, least.signal_writes, least.list_writes), (8, 1, 1));
        assert!(least.window_bytes >= 2 * RdmaTuning::LIST_MAX_BYTES);
    }
}

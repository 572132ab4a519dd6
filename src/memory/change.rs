//! Memory that was plugged, unplugged or remapped while a view of guest RAM was in use.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::region::{Backing, GuestRam, RamRegion, RegionLayout};

/// The first difference between a view of guest RAM and a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamChange {
    /// A region that did not exist, or had another length.
    Plugged(RegionLayout),
    /// A region that no longer exists.
    Unplugged(RegionLayout),
    /// Other memory is mapped at the same guest address.
    Replaced(RegionLayout),
}

impl fmt::Display for RamChange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (region, what) = match self {
            Self::Plugged(region) => (region, "was plugged"),
            Self::Unplugged(region) => (region, "was unplugged"),
            Self::Replaced(region) => (region, "was mapped anew"),
        };
        write!(
            formatter,
            "memory of {} MiB at guest address {:#x} {what}",
            region.len_bytes.div_ceil(1 << 20),
            region.guest_address
        )
    }
}

impl GuestRam {
    /// What has changed since this view was made, compared to one that was made `now`.
    ///
    /// Memory of a shared file mapping counts as the same wherever this process has it mapped. Other memory
    /// is identified by its address in this process: a view cannot tell whether it was remapped at the same
    /// address.
    #[must_use]
    pub fn change_to(&self, now: &Self) -> Option<RamChange> {
        let same_place = |a: &RamRegion, b: &RamRegion| a.layout() == b.layout();
        let missing = |from: &Self, of: &Self| {
            let is_in = |region: &&RamRegion| from.regions().iter().any(|other| same_place(region, other));
            of.regions().iter().find(|region| !is_in(region)).map(RamRegion::layout)
        };
        if self.regions().len() == now.regions().len()
            && self.regions().iter().zip(now.regions()).all(|(before, now)| same_place(before, now))
        {
            let mut both = self.regions().iter().zip(now.regions());
            let replaced = both.find(|(before, now)| !is_same_memory(before, now));
            return replaced.map(|(before, _)| RamChange::Replaced(before.layout()));
        }
        missing(self, now).map(RamChange::Plugged).or_else(|| missing(now, self).map(RamChange::Unplugged))
    }
}

fn is_same_memory(before: &RamRegion, now: &RamRegion) -> bool {
    match (before.backing(), now.backing()) {
        (None, None) => before.host_address() == now.host_address(),
        (Some(before), Some(now)) => before.offset_bytes == now.offset_bytes && is_same_file(before, now),
        _ => false,
    }
}

fn is_same_file(before: &Backing, now: &Backing) -> bool {
    if Arc::ptr_eq(&before.file, &now.file) {
        return true;
    }
    let identity = |backing: &Backing| backing.file.metadata().map(|found| (found.dev(), found.ino()));
    matches!((identity(before), identity(now)), (Ok(before), Ok(now)) if before == now)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;

    const MIB: usize = 1 << 20;

    fn anonymous(ranges: &[(u64, usize)]) -> GuestRam {
        let ranges: Vec<_> = ranges.iter().map(|&(at, len)| (GuestAddress(at), len)).collect();
        GuestRam::from_vm_memory(&GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap()).unwrap()
    }

    fn of_file(file: &File, offset: u64) -> GuestRam {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        let ranges = [(GuestAddress(0), MIB, Some(file))];
        GuestRam::from_vm_memory(&GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap()).unwrap()
    }

    fn region(guest_address: u64, len: usize) -> RegionLayout {
        RegionLayout { guest_address, len_bytes: len as u64 }
    }

    #[test]
    fn memory_that_was_plugged_unplugged_or_replaced_is_named() {
        let before = anonymous(&[(0, MIB), (1 << 32, MIB)]);
        assert_eq!(before.change_to(&before.clone()), None);
        let change = |now: &[(u64, usize)]| before.change_to(&anonymous(now)).unwrap();
        let plugged = change(&[(0, MIB), (1 << 31, 2 * MIB), (1 << 32, MIB)]);
        assert_eq!(plugged, RamChange::Plugged(region(1 << 31, 2 * MIB)));
        assert_eq!(plugged.to_string(), "memory of 2 MiB at guest address 0x80000000 was plugged");
        assert_eq!(change(&[(0, MIB)]), RamChange::Unplugged(region(1 << 32, MIB)));
        assert_eq!(change(&[(0, MIB), (1 << 32, 2 * MIB)]), RamChange::Plugged(region(1 << 32, 2 * MIB)));
        assert_eq!(change(&[(0, MIB), (1 << 32, MIB)]), RamChange::Replaced(region(0, MIB)));
    }

    #[test]
    fn memory_of_a_file_is_known_by_the_file_and_not_by_where_it_is_mapped() {
        let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        files.iter().for_each(|file| file.set_len(2 * MIB as u64).unwrap());
        let before = of_file(&files[0], 0);
        let again = of_file(&files[0], 0);
        assert_ne!(before.regions()[0].host_address(), again.regions()[0].host_address());
        assert_eq!(before.change_to(&again), None);
        let replaced = Some(RamChange::Replaced(region(0, MIB)));
        assert_eq!(before.change_to(&of_file(&files[0], MIB as u64)), replaced);
        assert_eq!(before.change_to(&of_file(&files[1], 0)), replaced);
        assert_eq!(before.change_to(&anonymous(&[(0, MIB)])), replaced);
    }
}

//! What a process has mapped where: the lines of `/proc/PID/maps`.

/// A device and an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileIdentity {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) inode: u64,
}

/// A range of addresses with a file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    start: u64,
    end: u64,
    /// Where the range begins in the file.
    pub(super) offset: u64,
    pub(super) file: FileIdentity,
    pub(super) writable: bool,
    pub(super) shared: bool,
}

/// The mappings of files; lines that are not understood are left out.
pub(super) fn parse(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_line).filter(|mapping| mapping.file.inode != 0).collect()
}

/// `7f12ebe00000-7f12efe00000 rw-s 00000000 00:01 1048    /memfd:memory-backend-memfd (deleted)`
fn parse_line(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?.as_bytes();
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?.parse().ok()?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let half = |text| u32::from_str_radix(text, 16).ok();
    Some(Mapping {
        start: number(start)?,
        end: number(end)?,
        offset: number(offset)?,
        file: FileIdentity { major: half(major)?, minor: half(minor)?, inode },
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
    })
}

/// The one file that is behind all of these addresses, without gaps. The kernel may list a mapping in parts.
pub(super) fn mapping_of(mappings: &[Mapping], start: u64, len: u64) -> Option<Mapping> {
    let end = start.checked_add(len)?;
    let first = mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&start))?;
    let mut whole =
        Mapping { start, offset: first.offset.checked_add(start - first.start)?, ..first.clone() };
    while whole.end < end {
        let continues = |next: &&Mapping| {
            next.start == whole.end
                && next.file == whole.file
                && whole.offset.checked_add(whole.end - whole.start) == Some(next.offset)
        };
        let next = mappings.iter().find(continues)?;
        // Sorted and not empty, so this ends.
        whole.end = Some(next.end).filter(|&next_end| next_end > whole.end)?;
        whole.writable &= next.writable;
        whole.shared &= next.shared;
    }
    whole.end = end;
    Some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 1048                       /memfd:memory-backend-memfd (deleted)
7f0000400000-7f0000800000 rw-s 00400000 00:01 1048                       /memfd:memory-backend-memfd (deleted)
7f0000800000-7f0000c00000 rw-s 00000000 00:01 1049                       /memfd:memory-backend-memfd (deleted)
7f0000c00000-7f0000e00000 rw-p 00000000 fd:01 77                         /path/with a space
7f0001000000-7f0001200000 rw-p 00000000 00:00 0 
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
";

    fn file(at: u64, len: u64) -> Option<(u64, u64, bool)> {
        let mapping = mapping_of(&parse(MAPS), at, len)?;
        Some((mapping.file.inode, mapping.offset, mapping.shared && mapping.writable))
    }

    #[test]
    fn a_mapping_in_parts_is_one_file() {
        assert_eq!(file(0x7f00_0000_0000, 0x80_0000), Some((1048, 0, true)));
        assert_eq!(file(0x7f00_0020_0000, 0x60_0000), Some((1048, 0x20_0000, true)));
    }

    #[test]
    fn addresses_with_two_files_or_none_behind_them_have_no_file() {
        assert_eq!(file(0x7f00_0000_0000, 0x80_1000), None);
        assert_eq!(file(0x7f00_0100_0000, 0x1000), None);
        assert_eq!(file(0x7f00_00d0_0000, 0x20_0000), None);
        assert_eq!(file(u64::MAX, 2), None);
    }

    #[test]
    fn a_private_mapping_is_not_shared() {
        assert_eq!(file(0x7f00_00c0_0000, 0x1000), Some((77, 0, false)));
    }

    #[test]
    fn other_lines_are_left_out() {
        assert_eq!(parse(MAPS).len(), 4);
        assert!(parse("x\n\n7f-80\n7f-80 rw-s 0 0:z 1\n-- rw-s 0 0:0 1").is_empty());
    }
}

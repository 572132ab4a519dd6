//! Digests of a file's blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use super::digest::ImageDigest;
use super::extents::{BLOCK_BYTES, next_extent, region_of};
use crate::digest::{self, BLOCK_PAGES, Digest, digest_of_zeros};
use crate::memory::{PAGE_BYTES, PageRun, RamLayout};

/// The digests of the blocks of all parts, in order, computed by all workers of the current pool.
///
/// The file is read, not its mapping: if it is truncated meanwhile, the read fails and causes no SIGBUS, and
/// reading a hole does not fill it. `look` is called with each block that has data, and its offset.
pub(super) fn digests(
    file: &File,
    parts: &RamLayout,
    look: impl Fn(u64, &[u8]) -> io::Result<()> + Sync,
) -> io::Result<Vec<Digest>> {
    let zeros = digest_of_zeros(BLOCK_PAGES);
    let one = |buffer: &mut Vec<u8>, block: PageRun| {
        let at = parts.regions[block.region].guest_address + block.first_page * PAGE_BYTES;
        let end = at + block.len_bytes();
        if next_extent(file, at, end)?.is_none() {
            return Ok(if block.pages == BLOCK_PAGES { zeros } else { digest_of_zeros(block.pages) });
        }
        buffer.resize(usize::try_from(block.len_bytes()).unwrap_or(0), 0);
        read_at(file, buffer, at)?;
        look(at, buffer)?;
        Ok(blake3::hash(buffer).into())
    };
    digest::blocks(parts).into_par_iter().map_init(Vec::new, one).collect()
}

/// Fills the buffer from an offset in the file, and with zeros past the file's end.
fn read_at(file: &File, mut buffer: &mut [u8], mut at: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => {
                buffer.fill(0);
                break;
            }
            Ok(read) => {
                buffer = &mut buffer[read..];
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The digest of the whole file, from those of its parts.
pub(super) fn image_digest(len_bytes: u64, parts: &RamLayout, digests: &[Digest]) -> ImageDigest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len_bytes.to_le_bytes());
    let zeros = digest_of_zeros(BLOCK_PAGES);
    let mut digests = digests.iter();
    let mut at = 0;
    while at < len_bytes {
        let pages = (len_bytes - at).div_ceil(PAGE_BYTES).min(BLOCK_PAGES);
        let known = region_of(parts, at).and_then(|_| digests.next());
        match known {
            Some(digest) => hasher.update(digest),
            None if pages == BLOCK_PAGES => hasher.update(&zeros),
            None => hasher.update(&digest_of_zeros(pages)),
        };
        at += BLOCK_BYTES;
    }
    ImageDigest(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::super::extents::Content;
    use super::*;

    fn whole(file: &File, len_bytes: u64) -> ImageDigest {
        let parts = Content::of(file, len_bytes).unwrap().parts;
        image_digest(len_bytes, &parts, &digests(file, &parts, |_, _| Ok(())).unwrap())
    }

    #[test]
    fn the_digest_is_of_the_content_whatever_the_holes() {
        const LEN: u64 = (9 << 20) + 4099;
        let file = |written: &[(u64, &[u8])]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(LEN).unwrap();
            written.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
            file
        };
        let zeros = vec![0; 5 << 20];
        let sparse = whole(&file(&[(LEN - 3, b"ern"), (1 << 20, b"t")]), LEN);
        assert_eq!(sparse, whole(&file(&[(1 << 20, &zeros), (1 << 20, b"t"), (LEN - 3, b"ern")]), LEN));
        assert_ne!(sparse, whole(&file(&[(LEN - 3, b"ern"), (1 << 20, b"u")]), LEN));
        assert_ne!(sparse, whole(&file(&[(LEN - 3, b"ern"), (3 << 20, b"t")]), LEN));
        let (empty, shorter) = (whole(&file(&[]), LEN), whole(&file(&[]), LEN - 1));
        assert_ne!(empty, shorter, "the length counts");
    }

    #[test]
    fn the_end_of_a_file_counts_as_zeros_up_to_its_page() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"tern", 0).unwrap();
        let parts = Content::of(&file, 4).unwrap().parts;
        let mut page = [0; 4096];
        page[..4].copy_from_slice(b"tern");
        assert_eq!(digests(&file, &parts, |_, _| Ok(())).unwrap(), [*blake3::hash(&page).as_bytes()]);
    }
}

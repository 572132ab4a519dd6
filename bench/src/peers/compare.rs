use std::fs::File;
use std::os::unix::fs::FileExt;

use super::failure::Failure;

/// The bytes of one read.
const PIECE_BYTES: usize = 1 << 20;

/// Fails unless two files, the RAM of a guest at both ends, are equal byte by byte.
pub(crate) fn equal_files(source: &File, destination: &File, what: &str) -> Result<(), Failure> {
    equal_files_from(0, source, destination, what)
}

/// The same from this byte on.
pub(crate) fn equal_files_from(
    first: u64,
    source: &File,
    destination: &File,
    what: &str,
) -> Result<(), Failure> {
    let failed = || Failure::system(format!("compare {what}"));
    let len = source.metadata().map_err(failed())?.len();
    let differs = |page| Failure::Differs { what: what.to_owned(), page };
    if destination.metadata().map_err(failed())?.len() != len {
        return Err(differs(len / 4096));
    }
    let (mut ours, mut theirs) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    for start in (first..len).step_by(PIECE_BYTES) {
        let piece = usize::try_from(len - start).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        source.read_exact_at(&mut ours[..piece], start).map_err(failed())?;
        destination.read_exact_at(&mut theirs[..piece], start).map_err(failed())?;
        if ours[..piece] != theirs[..piece] {
            let at = ours.iter().zip(&theirs).position(|(one, other)| one != other).unwrap_or(0);
            return Err(differs((start + at as u64) / 4096));
        }
    }
    Ok(())
}

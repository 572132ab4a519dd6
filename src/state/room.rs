//! How many state files one source can leave behind with guests that never ran on this host.
//!
//! Such a file answers a source that is still in doubt, so it is kept for [`KEPT_FOR`]. Afterwards an answer
//! is that the attempt is unknown, which settles nothing at the source. A source that has left [`KEPT_MAX`]
//! files brings no guest with another name until some are old enough or removed: it pushes out neither the
//! answers to others nor its own.

use std::time::{Duration, SystemTime};

use super::error::StateError;
use super::file::{claim_file, names, status};
use super::folder::StateFolder;
use super::index::Index;
use super::sender::Sender;

/// Makes room for the state file of a guest, unless it exists.
///
/// # Errors
/// [`StateError::Crowded`] if the sender has left too many.
pub(super) fn make_room(
    (folder, index): (&StateFolder, &Index),
    name: &str,
    sender: Sender,
    now: SystemTime,
) -> Result<(), StateError> {
    if status(folder, name).is_some() {
        return Ok(());
    }
    let mut left = 0;
    for other in names(folder) {
        let (summary, modified) = index.summary(folder, &other);
        let Some(left_by) = summary.left_by else { continue };
        let is_old = now.duration_since(modified).is_ok_and(|age| age > KEPT_FOR);
        if is_old && forget_if_left(folder, &other) {
            continue;
        }
        left += usize::from(left_by == sender);
    }
    if left >= KEPT_MAX {
        return Err(StateError::Crowded { folder: folder.path().to_owned(), left });
    }
    Ok(())
}

/// Removes a state file, if no process has its guest and no guest ran.
fn forget_if_left(folder: &StateFolder, name: &str) -> bool {
    let Ok((journal, keeper)) = claim_file(folder, name) else { return false };
    let is_left = Sender::that_left(&journal).is_some();
    keeper.release(name, &journal, is_left);
    if is_left {
        tracing::info!(
            "the records of {name} are forgotten: it never ran on this host, and has not been asked for"
        );
    }
    is_left
}

/// The most state files of guests that one source sent and that never ran on this host: 8.5 MiB.
pub(super) const KEPT_MAX: usize = 64;
/// How long such a file is kept.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

use std::fs;
use std::path::PathBuf;
use std::process;

use crate::image::{Store, take_offer};
use crate::wire::Message;

/// The kind of the message that offers a file.
const KIND: u16 = 14;

/// A file that a peer offers, up to the mapping of its parts in a folder of its own.
pub fn image_offer(input: &[u8]) {
    let Ok(Message::OfferImage(offer)) = Message::decode(KIND, input) else { return };
    let parent = std::env::temp_dir().join(format!("sterna-fuzzing-{}", process::id()));
    let into = parent.join("into");
    if fs::create_dir_all(&into).is_err() {
        return;
    }
    let beside = || fs::read_dir(&parent).into_iter().flatten().flatten().map(|entry| entry.path());
    let store =
        Store::new(&PathBuf::from(format!("{}/", into.display())), false).expect("the folder is there");
    let _ = take_offer(&store, &offer);
    assert!(beside().eq([into.clone()]), "a peer's name stays within the folder: {:?}", offer.name);
    let _ = fs::remove_dir_all(&parent);
}

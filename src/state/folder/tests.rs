use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::thread;

use super::*;

const LEN: u64 = 136 * 1024;

fn place() -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("state");
    (place, path)
}

fn open(path: &Path) -> Result<StateFolder, FolderError> {
    StateFolder::open(path, StorageCheck::Accept)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[test]
fn a_missing_folder_and_those_above_it_are_made_for_their_user_alone() {
    let (place, _) = place();
    let path = place.path().join("above/state");
    for _ in 0..2 {
        let folder = open(&path).unwrap();
        assert_eq!(folder.path(), path);
        for made in [&path, path.parent().unwrap()] {
            assert_eq!(fs::metadata(made).unwrap().mode() & 0o7777, 0o700);
        }
    }
    let file = place.path().join("file");
    fs::write(&file, b"").unwrap();
    for below in [&file, &file.join("state")] {
        assert!(matches!(open(below), Err(FolderError::NotAFolder(path)) if path == file));
    }
}

#[test]
fn what_is_made_has_all_its_blocks_and_is_this_users_alone() {
    let (_place, path) = place();
    let folder = open(&path).unwrap();
    folder.make_file("tern", LEN, b"head").unwrap();
    let found = fs::metadata(path.join("tern")).unwrap();
    assert_eq!(found.len(), LEN);
    assert!(found.blocks() * 512 >= LEN, "{} blocks", found.blocks());
    assert_eq!(found.mode() & 0o7777, 0o600);
    let mut bytes = vec![1; LEN.try_into().unwrap()];
    folder.open_file("tern", false).unwrap().unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.starts_with(b"head") && bytes[4..].iter().all(|&byte| byte == 0));
    assert_eq!(folder.names().unwrap(), ["tern"]);
}

#[test]
fn a_file_that_another_process_made_first_stays_as_it_is() {
    let (_place, path) = place();
    let folder = open(&path).unwrap();
    folder.make_file("tern", 4, b"mine").unwrap();
    folder.make_file("tern", 4, b"late").unwrap();
    assert_eq!(fs::read(path.join("tern")).unwrap(), b"mine");
    thread::scope(|scope| {
        let made = [b"a", b"b", b"c"].map(|content| {
            let folder = folder.clone();
            scope.spawn(move || folder.make_file("gull", 1, content))
        });
        made.into_iter().for_each(|made| made.join().unwrap().unwrap());
    });
    assert!(matches!(&fs::read(path.join("gull")).unwrap()[..], b"a" | b"b" | b"c"));
    // Nothing else is left behind.
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn a_link_under_a_temporary_name_is_neither_followed_nor_removed() {
    let (place, path) = place();
    let folder = open(&path).unwrap();
    let victim = place.path().join("victim");
    fs::write(&victim, b"precious").unwrap();
    for number in 0..3 {
        symlink(&victim, path.join(temporary_name("tern", number))).unwrap();
    }
    symlink(place.path().join("nowhere"), path.join(temporary_name("tern", 3))).unwrap();
    folder.make_file("tern", LEN, b"head").unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert!(!place.path().join("nowhere").exists());
    assert!(path.join(temporary_name("tern", 0)).is_symlink());
    assert_eq!(folder.names().unwrap(), ["tern"]);
    assert!(fs::symlink_metadata(path.join("tern")).unwrap().is_file());
}

#[test]
fn a_file_is_opened_only_if_it_is_regular_and_this_users_alone() {
    let (place, path) = place();
    let folder = open(&path).unwrap();
    assert!(folder.open_file("none", true).unwrap().is_none());
    fs::write(place.path().join("target"), b"").unwrap();
    symlink(place.path().join("target"), path.join("link")).unwrap();
    symlink("none", path.join("dangling")).unwrap();
    fs::create_dir(path.join("folder")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, path.join("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap();
    fs::write(path.join("open"), b"").unwrap();
    set_mode(&path.join("open"), 0o620);
    fs::write(path.join("plain"), b"").unwrap();
    set_mode(&path.join("plain"), 0o640);
    for write in [false, true] {
        let refused = |name| folder.open_file(name, write).unwrap_err();
        assert!(matches!(refused("link"), FolderError::Link(_)));
        assert!(matches!(refused("dangling"), FolderError::Link(_)));
        for name in ["folder", "pipe", "socket"] {
            assert!(matches!(refused(name), FolderError::NotAFile(at) if at == path.join(name)), "{name}");
        }
        assert!(matches!(refused("open"), FolderError::Writable { mode: 0o620, .. }));
        assert!(folder.open_file("plain", write).unwrap().is_some());
    }
    let other = StateFolder(Arc::new(Inner {
        folder: fs::File::open(&path).unwrap().into(),
        path: path.clone(),
        user: user() + 1,
    }));
    assert!(matches!(other.open_file("plain", false), Err(FolderError::Owner { .. })));
}

#[test]
fn a_name_that_leads_out_of_the_folder_is_no_name() {
    let (_place, path) = place();
    let folder = open(&path).unwrap();
    let file = fs::File::open(&path).unwrap();
    for name in ["", ".", "..", "../x", "a/b", "a\0b"] {
        assert!(matches!(folder.open_file(name, true), Err(FolderError::Name(_))), "{name:?}");
        assert!(matches!(folder.make_file(name, 1, b""), Err(FolderError::Name(_))), "{name:?}");
        assert!(folder.remove_file(name).is_err(), "{name:?}");
        assert!(!folder.is_at(&file, name), "{name:?}");
    }
}

#[test]
fn a_folder_that_was_moved_away_is_used_all_the_same_and_the_one_in_its_place_is_not() {
    let (place, path) = place();
    let folder = open(&path).unwrap();
    folder.make_file("tern", 4, b"mine").unwrap();
    let moved = place.path().join("moved");
    fs::rename(&path, &moved).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("tern"), b"fake").unwrap();
    let file = folder.open_file("tern", true).unwrap().unwrap();
    assert!(folder.is_at(&file, "tern"));
    folder.make_file("gull", 4, b"mine").unwrap();
    assert!(moved.join("gull").exists() && !path.join("gull").exists());
    folder.remove_file("tern").unwrap();
    assert!(!folder.is_at(&file, "tern"));
    assert_eq!(fs::read(path.join("tern")).unwrap(), b"fake");
}

#[test]
fn a_folder_that_others_can_change_is_refused_and_so_is_one_below_it() {
    let (place, path) = place();
    let above = place.path().join("above");
    let below = above.join("state");
    open(&below).unwrap();
    for mode in [0o720, 0o702, 0o777] {
        set_mode(&above, mode);
        assert!(matches!(open(&below), Err(FolderError::Writable { path, .. }) if path == above), "{mode:o}");
        fs::create_dir_all(&path).unwrap();
        // The sticky bit protects a folder's entries, and not the folder itself.
        for mode in [mode, mode | STICKY] {
            set_mode(&path, mode);
            assert!(matches!(open(&path), Err(FolderError::Writable { path: at, .. }) if at == path));
        }
        set_mode(&above, mode | STICKY);
        open(&below).unwrap();
    }
}

#[test]
fn a_folder_of_another_user_is_refused_also_if_that_is_root() {
    let (place, path) = place();
    open(&path).unwrap();
    let other = user() + 1;
    // Folders of root above it are safe for any user, those of a user only for that user.
    let refused = if user() == 0 { path.clone() } else { place.path().to_owned() };
    set_mode(place.path(), 0o755);
    let error = StateFolder::open_as(&path, StorageCheck::Accept, other).unwrap_err();
    assert!(
        matches!(&error, FolderError::Owner { path, owner, user: of } if *path == refused
            && *owner == user() && *of == other),
        "{error}"
    );
    if user() == 0 {
        std::os::unix::fs::chown(&path, Some(other), None).unwrap();
        StateFolder::open_as(&path, StorageCheck::Accept, other).unwrap();
        assert!(matches!(open(&path), Err(FolderError::Owner { .. })), "another user's for root");
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        std::os::unix::fs::chown(place.path(), Some(other), None).unwrap();
        assert!(matches!(open(&path), Err(FolderError::Owner { path, .. }) if path == place.path()));
    }
}

#[test]
fn a_link_on_the_way_is_followed_if_its_owner_may_be_trusted_and_the_folder_is_none() {
    let (place, path) = place();
    fs::create_dir(place.path().join("real")).unwrap();
    symlink("real", place.path().join("relative")).unwrap();
    symlink(place.path().join("real"), place.path().join("absolute")).unwrap();
    symlink("real/../relative", place.path().join("twice")).unwrap();
    for link in ["relative", "absolute", "twice"] {
        let folder = open(&place.path().join(link).join("state")).unwrap();
        folder.make_file(link, 1, b"").unwrap();
    }
    assert_eq!(fs::read_dir(place.path().join("real/state")).unwrap().count(), 3);
    for link in ["relative", "relative/"] {
        assert!(matches!(open(&place.path().join(link)), Err(FolderError::Link(_))), "{link}");
    }
    symlink("dangling/x", &path).unwrap();
    assert!(matches!(open(&path), Err(FolderError::Link(_))));
    symlink("loop", place.path().join("loop")).unwrap();
    assert!(matches!(open(&place.path().join("loop/state")), Err(FolderError::Io { .. })));
    if user() == 0 {
        std::os::unix::fs::lchown(place.path().join("absolute"), Some(1), None).unwrap();
        let error = open(&place.path().join("absolute/state")).unwrap_err();
        assert!(matches!(&error, FolderError::Owner { owner: 1, .. }), "{error}");
    }
}

#[test]
fn a_tmpfs_is_refused_by_name_before_anything_is_made_and_used_if_that_is_accepted() {
    let Ok(place) = tempfile::tempdir_in("/dev/shm") else { return };
    if Storage::of(fs::File::open(place.path()).unwrap()).unwrap() != Storage::Memory("a tmpfs") {
        return;
    }
    let path = place.path().join("state");
    for made in [false, true] {
        let error = StateFolder::open(&path, StorageCheck::Refuse).unwrap_err();
        assert!(error.to_string().contains("is on a tmpfs"), "{error}");
        assert_eq!(path.exists(), made);
        if !made {
            open(&path).unwrap().make_file("tern", LEN, b"head").unwrap();
        }
    }
}

#[test]
fn file_systems_that_lose_state_or_share_it_are_known_and_disks_are_not_among_them() {
    let refused = |magic| Storage::of_magic(magic).check(Path::new("/state")).map_err(|e| e.to_string());
    for (magic, name) in [
        (0x0102_1994, "tmpfs"),
        (0x794c_7630, "overlay"),
        (0x6969, "NFS"),
        (0xff53_4d42, "SMB"),
        (0xfe53_4d42, "SMB"),
        (0x0102_1997, "9p"),
        (0x6573_5546, "FUSE"),
        (0x00c3_6400, "CephFS"),
        (0x0116_1970, "GFS2"),
        (0x7461_636f, "OCFS2"),
    ] {
        let text = refused(magic).unwrap_err();
        assert!(text.contains(name), "{text}");
    }
    // ext4, XFS, F2FS; btrfs, ZFS; an unknown one.
    for magic in [0xef53, 0x5846_5342, 0xf2f5_2010, 0x9123_683e, 0x2fc1_2fc1, 0x1234_5678] {
        refused(magic).unwrap();
    }
    assert_eq!(Storage::of_magic(0x9123_683e), Storage::CopyOnWrite);
}

#[test]
fn a_file_that_finds_no_room_leaves_nothing_behind() {
    let (_place, path) = place();
    let folder = open(&path).unwrap();
    // Longer than any file may be.
    let error = folder.make_file("tern", u64::MAX, b"").unwrap_err();
    assert!(matches!(error, FolderError::Room { .. }), "{error}");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
}

const STICKY: u32 = 0o1000;

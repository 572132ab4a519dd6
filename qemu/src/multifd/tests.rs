//! What the channels name, keep and refuse, alone and with the main channel.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use crate::multifd::build::{init, packet, put, stale_sync, sync};
use crate::multifd::{ChannelPages, Channels, ChannelsError, Dialect, PacketFault};
use crate::names::{Content, PageNames, SharedBlock};
use crate::page::Marks;
use crate::stream::build::Stream;
use crate::stream::{Expected, Stage, StreamError, StreamFault, Watch, read};

/// Longer than any pause of a loaded machine.
const LONG: Duration = Duration::from_secs(300);
const BLOCKS: [(&str, u64); 2] = [("mem0", 0x10_000), ("vga.vram", 0x4000)];

#[derive(Default)]
struct Named(Mutex<Vec<(usize, u64, Content)>>);

impl PageNames for Named {
    fn named(&self, block: usize, page: u64, content: Content) {
        self.0.lock().unwrap().push((block, page, content));
    }
}

impl Named {
    fn sorted(&self) -> Vec<(u64, bool)> {
        let named = self.0.lock().unwrap();
        let mut pages: Vec<_> =
            named.iter().map(|(_, page, content)| (*page, *content == Content::Zero)).collect();
        pages.sort_unstable();
        pages
    }
}

fn shared() -> [SharedBlock; 1] {
    [SharedBlock { name: "mem0".to_owned(), len_bytes: 0x10_000 }]
}

fn channels(count: usize, dialect: Dialect) -> Channels {
    Channels::new(count, dialect, &shared(), 0x4000)
}

fn syncs(count: u64) -> Marks {
    Marks { sections: count, flushes: 0 }
}

/// Reads the only channel of a migration.
fn read_one(dialect: Dialect, packets: &[Vec<u8>]) -> (Result<(), PacketFault>, Named) {
    let (channels, names) = (channels(1, dialect), Named::default());
    let bytes = [init(0), packets.concat()].concat();
    let read = channels.read(&mut bytes.as_slice(), &names).map_err(|error| error.fault);
    (read, names)
}

fn refused(dialect: Dialect, packet: Vec<u8>) -> PacketFault {
    read_one(dialect, &[packet]).0.expect_err("it must be refused")
}

/// Reads a main channel beside its multifd channels.
fn read_stream(
    channels: &Channels,
    main: &Stream,
    others: &[Vec<u8>],
) -> (Result<Vec<u8>, StreamError>, Named) {
    struct Finishing<'a>(&'a Channels);
    impl Watch for Finishing<'_> {
        fn reached(&mut self, _: Stage, _: Marks) {}

        fn finish_channels(&mut self, marks: Marks) -> Result<ChannelPages, ChannelsError> {
            self.0.finish(marks, LONG)
        }
    }
    let (names, shared) = (Named::default(), shared());
    let expected =
        Expected { shared: &shared, machine: None, unshared_max_bytes: 1 << 20, state_max_bytes: 1 << 16 };
    let blob = thread::scope(|scope| {
        for bytes in others {
            scope.spawn(|| channels.read(&mut bytes.as_slice(), &names));
        }
        read(&mut main.bytes.as_slice(), &expected, &names, &mut Finishing(channels))
    });
    let written = blob.map(|blob| {
        let mut bytes = Vec::new();
        blob.write_to(&mut bytes).unwrap();
        bytes
    });
    (written, names)
}

fn started() -> Stream {
    Stream::of("pc").start(&BLOCKS).eos()
}

#[test]
fn pages_of_shared_blocks_in_packets_are_named() {
    let packets =
        [packet(0, "mem0", &[(0x1000, 1), (0xf000, 2)], &[0x3000]), sync(), packet(0, "mem0", &[], &[0])];
    let (read, names) = read_one(Dialect::Nine, &packets);
    assert!(read.is_ok(), "{read:?}");
    assert_eq!(names.sorted(), [(0, true), (1, false), (3, true), (15, false)]);
}

#[test]
fn stale_lengths_of_old_sync_packets_do_not_count() {
    let packets =
        [packet(0, "mem0", &[(0, 1)], &[]), stale_sync("mem0"), packet(1, "mem0", &[(0x2000, 1)], &[])];
    let (read, names) = read_one(Dialect::Seven, &packets);
    assert!(read.is_ok(), "{read:?}");
    assert_eq!(names.sorted(), [(0, false), (2, false)]);
}

#[test]
fn other_pages_of_packets_get_into_the_blob() {
    let main = Stream::of("pc").start(&BLOCKS).flush().eos().part().flush().eos();
    let main = main.end().flush().eos().state();
    let first = [init(0), sync(), packet(0, "vga.vram", &[(0x1000, 1)], &[0x2000]), sync(), sync()].concat();
    let second =
        [init(1), sync(), sync(), packet(0, "vga.vram", &[(0x2000, 2), (0, 3)], &[0x1000]), sync()].concat();
    let (blob, names) = read_stream(&channels(2, Dialect::Nine), &main, &[first, second]);
    let expected = started().end().page(Some("vga.vram"), 0, 3).zero(None, 0x1000).page(None, 0x2000, 2);
    assert_eq!(blob.unwrap(), expected.eos().state().bytes);
    assert!(names.sorted().is_empty());
}

#[test]
fn the_later_contents_count_where_a_page_comes_on_both_channels() {
    // Machines before 8.1: a SYNC packet for each end of a section.
    let main = started().part().zero(Some("vga.vram"), 0).zero(None, 0x1000).eos();
    let main = main.part().zero(None, 0x2000).eos().end().eos().state();
    let other = [init(0), stale_sync("")].concat();
    let other = [other, packet(0, "vga.vram", &[(0x2000, 1)], &[]), stale_sync("vga.vram")].concat();
    let other =
        [other, packet(0, "vga.vram", &[(0, 2)], &[]), stale_sync("vga.vram"), stale_sync("")].concat();
    let (blob, _) = read_stream(&channels(1, Dialect::Seven), &main, &[other]);
    let expected = started().end().page(Some("vga.vram"), 0, 2).zero(None, 0x1000).zero(None, 0x2000);
    assert_eq!(blob.unwrap(), expected.eos().state().bytes);
}

#[test]
fn the_latest_of_three_contents_counts() {
    let main = started().part().zero(Some("vga.vram"), 0).eos().part().eos();
    let main = main.part().page(None, 0, 3).eos().end().eos().state();
    let sync = || stale_sync("vga.vram");
    let other =
        [init(0), sync(), sync(), packet(0, "vga.vram", &[(0, 2)], &[]), sync(), sync(), sync()].concat();
    let (blob, _) = read_stream(&channels(1, Dialect::Seven), &main, &[other]);
    let expected = started().end().page(Some("vga.vram"), 0, 3).eos().state();
    assert_eq!(blob.unwrap(), expected.bytes);
}

#[test]
fn a_channel_that_is_read_late_does_not_bring_back_older_contents() {
    let main = Stream::of("pc").start(&BLOCKS).flush().eos().end().flush().eos().state();
    let channels = channels(2, Dialect::Nine);
    let late = [init(0), packet(0, "vga.vram", &[(0, 1)], &[]), sync(), sync()].concat();
    let early = [init(1), sync(), packet(0, "vga.vram", &[(0, 2)], &[]), sync()].concat();
    assert!(channels.read(&mut early.as_slice(), &Named::default()).is_ok());
    let (blob, _) = read_stream(&channels, &main, &[late]);
    assert_eq!(blob.unwrap(), started().end().page(Some("vga.vram"), 0, 2).eos().state().bytes);
}

#[test]
fn flush_marks_order_pages_where_a_stream_has_them() {
    let main = Stream::of("pc").start(&BLOCKS).flush().eos().part().eos().part().zero(Some("vga.vram"), 0);
    let main = main.flush().eos().end().flush().eos().state();
    let other = [init(0), sync(), sync(), packet(0, "vga.vram", &[(0, 2)], &[]), sync()].concat();
    let (blob, _) = read_stream(&channels(1, Dialect::Nine), &main, &[other]);
    let expected = started().end().page(Some("vga.vram"), 0, 2).eos().state();
    assert_eq!(blob.unwrap(), expected.bytes);
}

#[test]
fn two_contents_between_the_same_marks_are_refused() {
    let main = started().part().zero(Some("vga.vram"), 0).eos().end().eos().state();
    let channel = |fill| {
        [init(0), stale_sync(""), packet(0, "vga.vram", &[(0, fill)], &[]), stale_sync(""), stale_sync("")]
    };
    let (blob, _) = read_stream(&channels(1, Dialect::Seven), &main, &[channel(1).concat()]);
    let fault = blob.unwrap_err().fault;
    assert!(matches!(fault, StreamFault::TwoVersions { offset: 0, .. }), "{fault}");

    // Before the first flush mark of a stream that has flush marks.
    let main = started().part().zero(Some("vga.vram"), 0).flush().eos().end().flush().eos().state();
    let other = [init(0), packet(0, "vga.vram", &[(0, 1)], &[]), sync(), sync()].concat();
    let (blob, _) = read_stream(&channels(1, Dialect::Nine), &main, &[other]);
    let fault = blob.unwrap_err().fault;
    assert!(matches!(fault, StreamFault::TwoVersions { offset: 0, .. }), "{fault}");

    let two = channels(2, Dialect::Nine);
    let other = |number, fill| [init(number), packet(0, "vga.vram", &[(0, fill)], &[])].concat();
    assert!(two.read(&mut other(0, 1).as_slice(), &Named::default()).is_ok());
    let error = two.read(&mut other(1, 2).as_slice(), &Named::default()).unwrap_err();
    assert!(matches!(error.fault, PacketFault::TwoVersions { .. }), "{error}");
}

#[test]
fn pages_of_unknown_blocks_or_outside_theirs_are_refused() {
    let main = Stream::of("pc").start(&BLOCKS).flush().eos().end().flush().eos().state();
    let read = |block: &str, offset: u64| {
        let other = [init(0), packet(0, block, &[], &[offset]), sync(), sync()].concat();
        read_stream(&channels(1, Dialect::Nine), &main, &[other]).0.unwrap_err().fault
    };
    assert!(matches!(read("pc.rom", 0), StreamFault::UnknownBlock(_)));
    assert!(matches!(read("vga.vram", 0x4000), StreamFault::PageOutside { offset: 0x4000, .. }));
    let outside = refused(Dialect::Nine, packet(0, "mem0", &[], &[0x10_000]));
    assert!(matches!(outside, PacketFault::Offset { offset: 0x10_000, .. }));
    let odd = refused(Dialect::Nine, packet(0, "mem0", &[(0x10, 1)], &[]));
    assert!(matches!(odd, PacketFault::Offset { offset: 0x10, .. }));
}

#[test]
fn packets_that_do_not_fit_are_refused() {
    let changed = |at, value| {
        let mut bytes = packet(0, "mem0", &[(0, 1)], &[]);
        put(&mut bytes, at, value);
        bytes
    };
    assert!(matches!(refused(Dialect::Nine, changed(0, 7)), PacketFault::Magic { magic: 7, .. }));
    assert!(matches!(refused(Dialect::Nine, changed(4, 2)), PacketFault::Magic { version: 2, .. }));
    assert!(matches!(refused(Dialect::Nine, changed(16, 129)), PacketFault::Pages { normal: 129, .. }));
    assert!(matches!(refused(Dialect::Nine, changed(16, u32::MAX)), PacketFault::Pages { .. }));
    assert!(matches!(refused(Dialect::Nine, changed(32, 128)), PacketFault::Pages { zero: 128, .. }));
    assert!(matches!(refused(Dialect::Nine, changed(12, 0)), PacketFault::Pages { allocated: 0, .. }));
    assert!(matches!(refused(Dialect::Nine, changed(20, 100)), PacketFault::Length { next: 100, normal: 1 }));
    assert!(matches!(refused(Dialect::Seven, changed(32, 1)), PacketFault::ZeroPages(1)));
    assert!(matches!(refused(Dialect::Nine, changed(64, 0)), PacketFault::BlockName));
    for (flags, name) in [(2, "ZLIB"), (4, "ZSTD"), (64, "DEVICE_STATE"), (1 << 20, "no name")] {
        let refused = refused(Dialect::Nine, changed(8, flags | 1));
        assert!(refused.to_string().contains(name), "{refused}");
    }
}

#[test]
fn pages_that_are_not_shared_are_bounded() {
    let page = |page: u64| packet(0, "vga.vram", &[], &[page * 4096]);
    let again = (0..16).map(|number| page(number % 4)).collect::<Vec<_>>();
    assert!(read_one(Dialect::Nine, &again).0.is_ok());
    let more = (0..5).map(page).collect::<Vec<_>>();
    let refused = read_one(Dialect::Nine, &more).0.unwrap_err();
    assert!(matches!(refused, PacketFault::UnsharedTooLarge { max: 0x4000 }), "{refused}");
}

#[test]
fn each_channel_has_its_own_number_and_the_same_uuid() {
    let (channels, names) = (channels(2, Dialect::Nine), Named::default());
    assert!(channels.read(&mut init(1).as_slice(), &names).is_ok());
    for number in [1, 2] {
        let error = channels.read(&mut init(number).as_slice(), &names).unwrap_err();
        assert!(matches!(error.fault, PacketFault::Number { channels: 2, .. }), "{error}");
    }
    let mut other = init(0);
    other[8] = 0;
    let error = channels.read(&mut other.as_slice(), &names).unwrap_err();
    assert!(matches!(error.fault, PacketFault::Uuid), "{error}");
    assert!(channels.failure().is_some());
}

#[test]
fn a_channel_cut_within_a_packet_fails_the_whole() {
    let whole = [init(0), packet(0, "mem0", &[(0, 1)], &[]), sync()].concat();
    for len in 0..whole.len() {
        let channels = channels(1, Dialect::Nine);
        let read = channels.read(&mut &whole[..len], &Named::default());
        let at_boundary = [64, 64 + 1344 + 4096].contains(&len);
        assert_eq!(read.is_ok(), at_boundary, "cut at {len}: {read:?}");
        let finished = channels.finish(syncs(1), LONG).unwrap_err();
        match finished {
            ChannelsError::Ended { syncs: 0, wanted: 1, .. } => assert!(at_boundary, "cut at {len}"),
            ChannelsError::Channel(error) => assert!(matches!(error.fault, PacketFault::Ends), "{error}"),
            other => panic!("cut at {len}: {other}"),
        }
    }
}

#[test]
fn channels_that_do_not_count_like_the_main_channel_are_refused() {
    let bytes = [init(0), sync(), sync()].concat();
    let read = |wanted| {
        let channels = channels(1, Dialect::Nine);
        channels.read(&mut bytes.as_slice(), &Named::default()).unwrap();
        channels.finish(syncs(wanted), LONG)
    };
    assert!(read(2).is_ok());
    assert!(matches!(read(1), Err(ChannelsError::TooManySyncs { syncs: 2, wanted: 1, .. })));
    assert!(matches!(read(3), Err(ChannelsError::Ended { syncs: 2, wanted: 3, .. })));
    for wanted in [0, 1] {
        let silent = channels(1, Dialect::Nine).finish(syncs(wanted), Duration::ZERO).unwrap_err();
        assert!(matches!(silent, ChannelsError::Silent { number: 0, .. }), "{silent}");
    }
}

#[test]
fn pages_after_the_last_sync_packet_are_refused() {
    let (channels, names) = (channels(1, Dialect::Nine), Named::default());
    struct Finished<'a>(&'a Channels, &'a [u8]);
    impl crate::input::Input for Finished<'_> {
        fn read_exact(&mut self, into: &mut [u8]) -> std::io::Result<()> {
            self.1.read_exact(into)
        }

        fn read_some(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            // What follows the SYNC packet arrives after the main channel was finished.
            if self.1.len() == packet(0, "mem0", &[], &[0]).len() {
                assert!(self.0.finish(syncs(1), LONG).is_ok());
            }
            self.1.read_some(into)
        }

        fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
            self.1.skip(bytes)
        }
    }
    let bytes = [init(0), sync(), packet(0, "mem0", &[], &[0])].concat();
    let error = channels.read(&mut Finished(&channels, &bytes), &names).unwrap_err();
    assert!(matches!(error.fault, PacketFault::AfterTheLast), "{error}");
}

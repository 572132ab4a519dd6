//! What the reader names, keeps and refuses.

use std::sync::Mutex;

use crate::input::Input;
use crate::multifd::{ChannelPages, ChannelsError};
use crate::names::{Content, PageNames, SharedBlock};
use crate::page::Marks;
use crate::stream::build::{RAM_ID, Stream};
use crate::stream::{Blob, Expected, Section, Stage, StreamError, StreamFault, Watch, read};

const MACHINE: &str = "pc-i440fx-7.2";
const BLOCKS: [(&str, u64); 3] = [("mem0", 0x10_000), ("vga.vram", 0x4000), ("pc.bios", 0x2000)];

#[derive(Default)]
struct Named(Mutex<Vec<(usize, u64, Content)>>);

impl PageNames for Named {
    fn named(&self, block: usize, page: u64, content: Content) {
        self.0.lock().unwrap().push((block, page, content));
    }
}

struct Read {
    blob: Result<Blob, StreamError>,
    named: Vec<(usize, u64, Content)>,
    stages: Vec<Stage>,
}

fn shared() -> Vec<SharedBlock> {
    vec![SharedBlock { name: "mem0".to_owned(), len_bytes: 0x10_000 }]
}

fn read_as(bytes: &[u8], change: impl FnOnce(&mut Expected<'_>)) -> Read {
    let (shared, names, mut stages) = (shared(), Named::default(), Vec::new());
    let mut expected = Expected {
        shared: &shared,
        machine: Some(MACHINE),
        unshared_max_bytes: 1 << 20,
        state_max_bytes: 1 << 16,
    };
    change(&mut expected);
    let blob = read(&mut { bytes }, &expected, &names, &mut |stage| stages.push(stage));
    Read { blob, named: names.0.into_inner().unwrap(), stages }
}

fn read_all(stream: &Stream) -> Read {
    read_as(&stream.bytes, |_| {})
}

fn written(blob: &Blob) -> Vec<u8> {
    let mut bytes = Vec::new();
    blob.write_to(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, blob.len_bytes());
    bytes
}

fn fault(stream: &Stream) -> StreamFault {
    read_all(stream).blob.expect_err("it must be refused").fault
}

fn error(stream: &Stream) -> String {
    read_all(stream).blob.expect_err("it must be refused").to_string()
}

fn started() -> Stream {
    Stream::of(MACHINE).start(&BLOCKS).eos()
}

/// A small stream with everything that is expected.
fn whole() -> Stream {
    let this = started().part().page(Some("mem0"), 0, 1).zero(None, 0x1000).page(None, 0xf000, 2);
    let this = this.page(Some("vga.vram"), 0x1000, 3).zero(None, 0x2000).page(Some("mem0"), 0x1000, 4).eos();
    let this =
        this.part().zero(Some("pc.bios"), 0).page(None, 0x1000, 5).page(Some("vga.vram"), 0x2000, 6).eos();
    let this =
        this.command(11, &[]).end().page(Some("mem0"), 0x3000, 7).page(Some("vga.vram"), 0x1000, 8).eos();
    this.state()
}

#[test]
fn pages_of_shared_blocks_are_named_in_order() {
    let read = read_all(&whole());
    assert!(read.blob.is_ok(), "{:?}", read.blob);
    let pages = [(0, Content::Bytes), (1, Content::Zero), (15, Content::Bytes), (1, Content::Bytes)];
    let pages = pages.into_iter().chain([(3, Content::Bytes)]).map(|(page, content)| (0, page, content));
    assert_eq!(read.named, pages.collect::<Vec<_>>());
}

#[test]
fn the_blob_has_the_latest_contents_of_each_other_page_once() {
    let read = read_all(&whole());
    let expected = started().command(11, &[]).end();
    let expected = expected.page(Some("vga.vram"), 0x1000, 8).page(None, 0x2000, 6);
    let expected = expected.zero(Some("pc.bios"), 0).page(None, 0x1000, 5).eos().state();
    assert_eq!(written(&read.blob.unwrap()), expected.bytes);
}

#[test]
fn a_page_that_became_zero_is_zero_in_the_blob() {
    let stream = started().part().page(Some("vga.vram"), 0, 1).eos().end().zero(None, 0).eos().state();
    let expected = started().end().zero(Some("vga.vram"), 0).eos().state();
    assert_eq!(written(&read_all(&stream).blob.unwrap()), expected.bytes);
}

#[test]
fn the_stages_come_in_order() {
    let stages = [Stage::RamStart, Stage::RamPart, Stage::RamPart, Stage::RamEnd, Stage::RamComplete];
    assert_eq!(read_all(&whole()).stages, stages);
}

#[test]
fn a_stream_of_an_older_machine_has_no_command() {
    let stream = started().part().page(Some("mem0"), 0, 1).eos().end().eos().state();
    assert_eq!(written(&read_all(&stream).blob.unwrap()), started().end().eos().state().bytes);
}

#[test]
fn a_record_continues_the_block_of_an_earlier_section() {
    let stream = started().part().zero(Some("vga.vram"), 0).eos().part().page(None, 0x1000, 1).eos();
    let stream = stream.end().zero(Some("mem0"), 0).zero(None, 0x1000).eos().state();
    let read = read_all(&stream);
    assert_eq!(read.named, [(0, 0, Content::Zero), (0, 1, Content::Zero)]);
    let expected = started().end().zero(Some("vga.vram"), 0).page(None, 0x1000, 1).eos().state();
    assert_eq!(written(&read.blob.unwrap()), expected.bytes);
}

#[test]
fn known_subsections_pass_on() {
    let configured = Stream::of(MACHINE)
        .subsection("configuration/target-page-bits", &12_u32.to_be_bytes())
        .subsection("configuration/capabilities", &0_u32.to_be_bytes())
        .subsection("configuration/uuid", &[9; 16]);
    let stream = configured.start(&BLOCKS).eos().end().eos().state();
    assert_eq!(written(&read_all(&stream).blob.unwrap()), stream.bytes);
}

#[test]
fn a_blob_read_again_is_the_same_blob() {
    let blob = written(&read_all(&whole()).blob.unwrap());
    let again = read_as(&blob, |_| {});
    assert_eq!((written(&again.blob.unwrap()), again.named), (blob, Vec::new()));
}

#[test]
fn a_stream_cut_at_any_byte_is_refused() {
    let stream = whole();
    for len in 0..stream.bytes.len() {
        let error = read_as(&stream.bytes[..len], |_| {}).blob.expect_err("a cut stream must be refused");
        assert!(matches!(error.fault, StreamFault::Ends), "cut at {len}: {error}");
        assert!(error.offset <= len as u64, "cut at {len}: {error}");
    }
}

#[test]
fn an_error_says_where_and_what() {
    let before = started().part();
    let at = before.bytes.len();
    assert_eq!(
        error(&before.u64(0x40)),
        format!(
            "the stream at byte {at}, in section ram (id 2): unknown record flags 0x40 (XBZRLE): the capability \
             xbzrle must be off"
        )
    );
    let cut = read_as(&whole().bytes[..at + 100], |_| {}).blob.unwrap_err();
    assert_eq!((cut.section, cut.offset >= at as u64), (Section::Ram { id: RAM_ID }, true));
}

#[test]
fn another_header_or_machine_is_refused() {
    assert!(matches!(fault(&Stream::default().raw(b"HTTP/1.1")), StreamFault::Header(_)));
    assert!(matches!(fault(&Stream::default().raw(b"QEVM\0\0\0\x02")), StreamFault::Header(_)));
    let old = Stream::default().raw(b"QEVM\0\0\0\x03").start(&BLOCKS);
    assert!(matches!(fault(&old), StreamFault::NoConfiguration(1)));
    let other = error(&Stream::of("pc-q35-10.0"));
    assert!(other.contains(r#""pc-q35-10.0", and "pc-i440fx-7.2" is expected"#), "{other}");
    let any = Stream::of("pc-q35-10.0").start(&BLOCKS).eos().end().eos().state();
    assert!(read_as(&any.bytes, |expected| expected.machine = None).blob.is_ok());
    let endless = Stream::default().raw(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff");
    assert!(matches!(fault(&endless), StreamFault::MachineLength { len: u32::MAX, .. }));
}

#[test]
fn unknown_subsections_and_capabilities_are_refused_by_name() {
    let configured = || Stream::of(MACHINE);
    assert!(error(&configured().subsection("configuration/colo", &[])).contains("configuration/colo"));
    let capability = [&[0, 0, 0, 1, 10][..], b"mapped-ram"].concat();
    let refused = error(&configured().subsection("configuration/capabilities", &capability));
    assert!(refused.contains(r#"the capability "mapped-ram" changes the stream"#), "{refused}");
    let large = configured().subsection("configuration/target-page-bits", &16_u32.to_be_bytes());
    assert!(matches!(fault(&large), StreamFault::PageBits(16)));
    let newer = configured().raw(&[5]).counted("configuration/uuid").raw(&[0, 0, 0, 2]).raw(&[0; 16]);
    assert!(matches!(fault(&newer), StreamFault::Subsection { version: 2, .. }));
}

#[test]
fn sections_of_devices_before_the_end_of_ram_are_refused_by_name() {
    for (kind, name, remedy) in [
        (4, "0000:00:02.0/virtio-mem-device-early", "virtio-mem"),
        (1, "dirty-bitmap", "dirty-bitmaps must be off"),
        (1, "0000:00:05.0/vfio", "VFIO"),
        (4, "timer", "a device that has such a section"),
    ] {
        let refused = error(&started().head(kind, 9, name, 1));
        assert!(
            refused.contains(&format!("section {name:?} (id 9)")) && refused.contains(remedy),
            "{refused}"
        );
    }
    assert!(matches!(fault(&started().raw(&[0])), StreamFault::SectionType { name: "EOF", .. }));
    assert!(matches!(fault(&started().raw(&[0x33])), StreamFault::SectionType { kind: 0x33, .. }));
}

#[test]
fn sections_of_ram_out_of_order_are_refused() {
    assert!(matches!(fault(&Stream::of(MACHINE).part()), StreamFault::SectionId(RAM_ID)));
    assert!(matches!(fault(&started().start(&BLOCKS)), StreamFault::RamTwice));
    assert!(matches!(fault(&started().raw(&[3, 0, 0, 0, 9])), StreamFault::SectionId(9)));
    let newer = Stream::of(MACHINE).head(1, RAM_ID, "ram", 5);
    assert!(matches!(fault(&newer), StreamFault::RamVersion { instance: 0, version: 5 }));
    let open = started().part().u64(0x10).raw(&[0x7e, 0, 0, 0, 9]);
    assert!(matches!(fault(&open), StreamFault::Footer([0x7e, 0, 0, 0, 9])));
}

#[test]
fn commands_of_capabilities_that_must_be_off_are_refused_by_name() {
    for (number, name) in [(1, "OPEN_RETURN_PATH"), (2, "PING"), (3, "POSTCOPY_ADVISE"), (12, "no name")] {
        let refused = error(&Stream::of(MACHINE).command(number, &[]));
        assert!(refused.contains(&format!("command {number} ({name})")), "{refused}");
    }
    let twice = started().command(11, &[]).command(11, &[]);
    assert!(matches!(fault(&twice), StreamFault::MisplacedCommand { number: 11, len: 0 }));
    let long = started().command(11, &[0]);
    assert!(matches!(fault(&long), StreamFault::MisplacedCommand { number: 11, len: 1 }));
}

#[test]
fn unknown_records_are_refused() {
    for flags in [0x00, 0x01, 0x0a, 0x30, 0x40, 0x48, 0x80, 0x100, 0x220, 0x400, 0x800, 0x1010, 0x1200] {
        let refused = fault(&started().part().u64(flags));
        assert!(matches!(refused, StreamFault::Flags(_)), "{flags:#x}: {refused:?}");
    }
    assert!(matches!(fault(&started().part().u64(0x1004)), StreamFault::Table));
    let no_table = Stream::of(MACHINE).head(1, RAM_ID, "ram", 4).u64(0x10);
    assert!(matches!(fault(&no_table), StreamFault::Table));
}

#[test]
fn records_outside_the_table_are_refused() {
    let part = || started().part();
    assert!(matches!(fault(&part().zero(None, 0)), StreamFault::NoBlock));
    assert!(matches!(fault(&part().zero(Some("mem1"), 0)), StreamFault::UnknownBlock(_)));
    assert!(matches!(fault(&part().zero(Some(""), 0)), StreamFault::BlockName(_)));
    for block in ["mem0", "pc.bios"] {
        let outside = fault(&part().page(Some(block), 0x10_000, 1));
        assert!(matches!(outside, StreamFault::PageOutside { offset: 0x10_000, .. }), "{outside:?}");
    }
    let filled = part().u64(2).counted("mem0").raw(&[9]);
    assert!(matches!(fault(&filled), StreamFault::FillByte(9)));
}

#[test]
fn a_table_that_does_not_fit_is_refused() {
    let table = |blocks: &[(&str, u64)]| fault(&Stream::of(MACHINE).start(blocks));
    assert!(matches!(table(&[("pc.bios", 0x1000)]), StreamFault::SharedMissing(_)));
    assert!(matches!(table(&[("mem0", 0x1000)]), StreamFault::SharedLength { found: 0x1000, .. }));
    assert!(matches!(table(&[BLOCKS[0], BLOCKS[1], BLOCKS[1]]), StreamFault::BlockTwice(_)));
    assert!(matches!(table(&[("odd", 0x10), ("even", 0xff0)]), StreamFault::BlockLength { .. }));
    assert!(matches!(table(&[("empty", 0), ("mem0", 0x10_000)]), StreamFault::BlockLength { .. }));
    assert!(matches!(table(&[BLOCKS[0], ("huge", 0x10_1000)]), StreamFault::UnsharedTooLarge { .. }));
    let many: Vec<_> = (0..4097).map(|number| (number.to_string(), 4096)).collect();
    let many: Vec<_> = many.iter().map(|(name, len)| (name.as_str(), *len)).collect();
    let stream = Stream::of(MACHINE).start(&many);
    let refused = read_as(&stream.bytes, |expected| expected.unshared_max_bytes = 1 << 30).blob.unwrap_err();
    assert!(matches!(refused.fault, StreamFault::TooManyBlocks(4096)), "{refused}");
    let less = Stream::of(MACHINE).head(1, RAM_ID, "ram", 4).u64(0x1000 | 4).counted("mem0").u64(0x10_000);
    assert!(matches!(fault(&less), StreamFault::BlockLength { .. }));
}

#[test]
fn the_device_state_is_bounded_and_whole() {
    let stream = whole();
    let state_len = Stream::default().state().bytes.len() as u64;
    assert!(read_as(&stream.bytes, |expected| expected.state_max_bytes = state_len).blob.is_ok());
    let refused =
        read_as(&stream.bytes, |expected| expected.state_max_bytes = state_len - 1).blob.unwrap_err();
    assert!(matches!(refused.fault, StreamFault::StateTooLarge { .. }), "{refused}");
    assert_eq!(refused.section, Section::DeviceState);
    assert!(matches!(fault(&started().end().eos().raw(&[0x55; 100])), StreamFault::Ends));
}

#[test]
fn flush_marks_without_channels_are_refused() {
    let stream = started().part().flush().eos().end().flush().eos().state();
    assert!(matches!(fault(&stream), StreamFault::Channels(ChannelsError::Unread)));
}

#[test]
fn the_channels_are_finished_after_the_last_record_and_before_the_device_state() {
    struct Recorded(Vec<(Stage, Marks)>, Option<Marks>);
    impl Watch for Recorded {
        fn reached(&mut self, stage: Stage, marks: Marks) {
            self.0.push((stage, marks));
        }

        fn finish_channels(&mut self, marks: Marks) -> Result<ChannelPages, ChannelsError> {
            assert_eq!(self.0.last().unwrap().0, Stage::Flush);
            self.1 = Some(marks);
            Ok(ChannelPages::default())
        }
    }
    let stream =
        Stream::of(MACHINE).start(&BLOCKS).flush().eos().part().flush().eos().end().flush().eos().state();
    let shared = shared();
    let expected =
        Expected { shared: &shared, machine: None, unshared_max_bytes: 1 << 20, state_max_bytes: 1 << 16 };
    let mut watch = Recorded(Vec::new(), None);
    read(&mut stream.bytes.as_slice(), &expected, &Named::default(), &mut watch).unwrap();
    let all = Marks { sections: 3, flushes: 3 };
    assert_eq!((watch.1, watch.0.last()), (Some(all), Some(&(Stage::RamComplete, all))));
    assert_eq!(all.syncs(), 3);
    assert_eq!(Marks { sections: 5, flushes: 0 }.syncs(), 5);
}

/// Counts how the bytes are asked for.
struct Counted<'a> {
    bytes: &'a [u8],
    reads: usize,
    read_bytes: usize,
    skipped: u64,
}

impl Input for Counted<'_> {
    fn read_exact(&mut self, into: &mut [u8]) -> std::io::Result<()> {
        self.reads += 1;
        self.read_bytes += into.len();
        self.bytes.read_exact(into)
    }

    fn read_some(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.reads += 1;
        let read = self.bytes.read_some(into)?;
        self.read_bytes += read;
        Ok(read)
    }

    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        self.skipped += bytes;
        self.bytes.skip(bytes)
    }
}

fn counted(stream: &Stream) -> Counted<'_> {
    let shared = [SharedBlock { name: "mem0".to_owned(), len_bytes: 1 << 30 }];
    let expected =
        Expected { shared: &shared, machine: None, unshared_max_bytes: 0, state_max_bytes: 1 << 16 };
    let mut input = Counted { bytes: &stream.bytes, reads: 0, read_bytes: 0, skipped: 0 };
    read(&mut input, &expected, &Named::default(), &mut |_| {}).unwrap();
    input
}

#[test]
fn bytes_of_shared_pages_are_skipped_and_one_read_is_enough_for_a_record() {
    let stream = Stream::of(MACHINE).start(&[("mem0", 1 << 30)]).eos().part().page(Some("mem0"), 0, 1);
    let stream = (1..1000).fold(stream, |stream, page| stream.page(None, page * 4096, 1));
    let stream = stream.eos().end().eos().state();
    let input = counted(&stream);
    assert_eq!(input.skipped, 1000 * 4096);
    assert!(input.reads < 1100, "{} reads", input.reads);
}

#[test]
fn records_of_zero_pages_are_read_many_at_a_time() {
    let stream = Stream::of(MACHINE).start(&[("mem0", 1 << 30)]).eos().part().zero(Some("mem0"), 0);
    let stream = (1..10_000).fold(stream, |stream, page| stream.zero(None, page * 4096));
    let stream = stream.eos().end().eos().state();
    let input = counted(&stream);
    assert!(input.reads < 200, "{} reads", input.reads);
}

#[test]
fn few_bytes_of_pages_between_zero_pages_are_read() {
    let stream = Stream::of(MACHINE).start(&[("mem0", 1 << 30)]).eos().part().zero(Some("mem0"), 0);
    let stream = (1..1000).fold(stream, |stream, page| match page % 2 {
        0 => stream.zero(None, page * 4096),
        _ => stream.page(None, page * 4096, 1),
    });
    let stream = stream.eos().end().eos().state();
    let input = counted(&stream);
    assert!(input.skipped > 490 * 4096 && input.read_bytes < 20_000, "{} bytes", input.read_bytes);
}

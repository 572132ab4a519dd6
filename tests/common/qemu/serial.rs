//! What the guests report on their serial port.

use std::fs;
use std::path::PathBuf;

use super::wait::wait_for;

/// The serial port of one QEMU, from its start.
#[derive(Clone, Debug)]
pub(crate) struct Serial {
    log: PathBuf,
    process: u32,
    /// What it said, if the guest powered off.
    last: Option<String>,
}

/// A line of the Linux guest's load; it prints one a second. The counters are those since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tick {
    pub(crate) number: u64,
    /// Pages and blocks rewritten, files written and read again, lines answered over TCP.
    pub(crate) pages: u64,
    pub(crate) wrong_pages: u64,
    pub(crate) blocks: u64,
    pub(crate) wrong_blocks: u64,
    pub(crate) files: u64,
    pub(crate) wrong_files: u64,
    pub(crate) lines: u64,
    /// The longest time in which the load did not run since the line before, by CLOCK_MONOTONIC.
    pub(crate) gap_ms: u64,
    /// The greatest change of CLOCK_REALTIME against CLOCK_MONOTONIC since the line before.
    pub(crate) jump_ms: i64,
}

/// Words of the kernel's messages about devices and clocks that do not work as they should.
const COMPLAINTS: [&str; 15] = [
    "lockup",
    "stall",
    "hung_task",
    "blocked for more than",
    "BUG",
    "Oops",
    "WARNING:",
    "Call Trace",
    "Kernel panic",
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "nobody cared",
    "lost interrupt",
    "transmit queue",
];

impl Serial {
    pub(super) fn new(log: PathBuf, process: u32) -> Self {
        Self { log, process, last: None }
    }

    pub(super) fn ended(text: String) -> Self {
        Self { log: PathBuf::new(), process: 0, last: Some(text) }
    }

    /// All that the guest said.
    pub(crate) fn text(&self) -> String {
        let read = || String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        self.last.clone().unwrap_or_else(read)
    }

    /// The last lines.
    pub(crate) fn end(&self) -> String {
        let text = self.text();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// The ticks so far.
    pub(crate) fn ticks(&self) -> Vec<Tick> {
        whole_lines(&self.text()).filter_map(Tick::parse).collect()
    }

    /// Waits for this many more ticks, and returns the last.
    #[track_caller]
    pub(crate) fn wait_for_ticks(&self, count: usize) -> Tick {
        let before = self.ticks().len();
        wait_for(&format!("{count} more ticks of the guest"), || {
            self.expect_process();
            self.ticks().len() >= before + count
        });
        *self.ticks().last().expect("they were counted")
    }

    /// How many sweeps the boot sector has begun.
    pub(crate) fn sweeps(&self) -> usize {
        self.numbers_after("S ").len()
    }

    /// Waits until the boot sector has checked all pages this many times from the beginning.
    #[track_caller]
    pub(crate) fn wait_for_sweeps(&self, count: usize) {
        let before = self.sweeps();
        wait_for(&format!("{count} more sweeps of the boot sector"), || {
            self.expect_process();
            self.sweeps() > before + count
        });
    }

    /// The addresses of the pages that the boot sector found wrong.
    pub(crate) fn wrong_addresses(&self) -> Vec<u64> {
        self.numbers_after("W ")
    }

    /// What the kernel or the load complain about.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let text = self.text();
        let complains =
            |line: &&str| line.starts_with("wrong ") || COMPLAINTS.iter().any(|word| line.contains(word));
        text.lines().filter(complains).map(str::to_owned).collect()
    }

    /// Waiting for a process that has ended would take long.
    #[track_caller]
    fn expect_process(&self) {
        let status = fs::read_to_string(format!("/proc/{}/stat", self.process)).unwrap_or_default();
        let state = status.rsplit(')').next().unwrap_or_default().trim_start();
        assert!(
            !state.is_empty() && !state.starts_with('Z'),
            "QEMU has ended; the guest said: {}",
            self.end()
        );
    }

    fn numbers_after(&self, mark: &str) -> Vec<u64> {
        let text = self.text();
        let numbers = whole_lines(&text).filter_map(|line| line.strip_prefix(mark));
        numbers.filter_map(|number| u64::from_str_radix(number, 16).ok()).collect()
    }
}

impl Tick {
    /// Wrong pages, blocks and files together.
    pub(crate) fn wrong(&self) -> u64 {
        self.wrong_pages + self.wrong_blocks + self.wrong_files
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix("tick ")?.split_whitespace();
        let mut tick = Self { number: words.next()?.parse().ok()?, ..Self::default() };
        let mut fields = 0;
        for word in words {
            let (name, value) = word.split_once('=')?;
            let counter = match name {
                "pages" => &mut tick.pages,
                "wrong_pages" => &mut tick.wrong_pages,
                "blocks" => &mut tick.blocks,
                "wrong_blocks" => &mut tick.wrong_blocks,
                "files" => &mut tick.files,
                "wrong_files" => &mut tick.wrong_files,
                "lines" => &mut tick.lines,
                "gap_ms" => &mut tick.gap_ms,
                "jump_ms" => {
                    tick.jump_ms = value.parse().ok()?;
                    fields += 1;
                    continue;
                }
                _ => return None,
            };
            *counter = value.parse().ok()?;
            fields += 1;
        }
        (fields == 9).then_some(tick)
    }
}

/// The lines that have an end. A migration cuts one in two, of which neither part counts.
fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(str::trim_end)
}

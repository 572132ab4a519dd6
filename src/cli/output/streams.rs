//! Lines on stdout and stderr. Output that fails is lost: it is no reason to end a process that holds a guest.

use std::fmt::Arguments;
use std::io::Write;

/// As `println!`, and never panics.
macro_rules! outln {
    ($($format:tt)*) => { $crate::cli::output::out(format_args!($($format)*)) };
}

/// As `eprintln!`, and never panics.
macro_rules! errln {
    ($($format:tt)*) => { $crate::cli::output::err(format_args!($($format)*)) };
}

pub(crate) use {errln, outln};

/// Writes a line to stdout.
pub(crate) fn out(text: Arguments<'_>) {
    // The reader may have gone away, or the disk may be full.
    let _ = std::io::stdout().write_all(line(text).as_bytes());
}

/// Writes a line to stderr.
pub(crate) fn err(text: Arguments<'_>) {
    // As above.
    let _ = std::io::stderr().write_all(line(text).as_bytes());
}

/// One write a line, so that lines of several threads do not mix.
fn line(text: Arguments<'_>) -> String {
    format!("{text}\n")
}

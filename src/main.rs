//! The `sterna` command.

// Both panic where the stream is gone; `cli::output` has `outln!` and `errln!`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}

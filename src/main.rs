//! The `sterna` command.

// Both panic if the stream is closed; `cli::output` has `outln!` and `errln!`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod poison;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}

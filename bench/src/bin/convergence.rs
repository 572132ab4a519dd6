//! Whether migrations converge, and whether what they predict comes true: see [`sterna_bench::convergence`].

use std::process::ExitCode;

use clap::Parser;
use sterna_bench::convergence::{Args, run};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

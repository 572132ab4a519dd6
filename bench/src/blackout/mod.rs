//! `sterna-bench blackout`: the parts of the time in which no host runs the guest, and their growth with the
//! guest's RAM.
//!
//! | table | |
//! |---|---|
//! | [`steps`] | synthetic RAM of up to 12 TiB: each step of the switch, beside a plain read of the bitmap |
//! | [`engine`] | whole migrations of sparse RAM of the same sizes within this process |
//! | [`real`] | with `--real`: guests with all of their RAM touched, between two processes |

mod arguments;
mod engine;
mod failure;
mod log;
mod real;
mod steps;
mod table;

use std::fs;
use std::process::ExitCode;

use serde_json::json;

pub(crate) use self::arguments::BlackoutArgs;
use self::failure::Failure;

pub(crate) fn run(args: &BlackoutArgs) -> ExitCode {
    match measure(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &BlackoutArgs) -> Result<(), Failure> {
    let figures = if args.real {
        json!({ "real": real::table(args)? })
    } else {
        let steps = steps::table(args)?;
        println!();
        json!({ "steps": steps, "engine": engine::table(args)? })
    };
    if let Some(file) = &args.json {
        fs::write(file, format!("{figures:#}\n"))?;
    }
    Ok(())
}

//! The only unsafe room: libibverbs as C declares it, and safe handles over it.
//!
//! - `structs`, `constants`: the declarations;
//! - `functions`: the library, loaded by name;
//! - `context`, `domain`, `region`, `completions`, `queue_pair`, `requests`: one handle per kind of object.
//!   Each owns its C object, holds an `Arc` of everything that the object was made from, and destroys the
//!   object on drop. So the order of teardown (queue pair; completion queue, channel, regions; domain;
//!   device) follows from ownership and a caller cannot get it wrong;
//! - `mapping`: the contract for memory that a device may access;
//! - `os`: poll, fcntl, getrlimit.
//!
//! Two facts hold for every call in this module. libibverbs is thread-safe: any thread may call any verb on
//! any object that is not being destroyed; hence the `Send` and `Sync` of the handles. A failed destroy
//! leaves no remedy: the object is leaked, never freed under the device, so drops ignore the result.

#![expect(unsafe_code, reason = "the one place that talks to libibverbs, a C library")]

pub(crate) mod completions;
pub(crate) mod constants;
pub(crate) mod context;
#[cfg(feature = "witness")]
pub(crate) mod described;
pub(crate) mod domain;
mod functions;
mod mapping;
pub(crate) mod os;
pub(crate) mod queue_pair;
pub(crate) mod region;
pub(crate) mod requests;
pub(crate) mod structs;

use std::ffi::c_int;
use std::io;

pub(crate) use functions::Functions;
pub use mapping::Mapping;

use crate::error::Error;

/// The result of a verb that returns 0 or an errno. Old libraries return -1 and set `errno` instead.
fn check(call: &'static str, result: c_int) -> Result<(), Error> {
    match result {
        0 => Ok(()),
        1.. => Err(Error::Call { call, source: io::Error::from_raw_os_error(result) }),
        _ => Err(last_error(call)),
    }
}

/// The error of a verb that sets `errno`.
fn last_error(call: &'static str) -> Error {
    Error::Call { call, source: io::Error::last_os_error() }
}

//! Two independent bindings of libibverbs, as witnesses for `sterna-rdma`. The package has tests only:
//!
//! - `tests/declarations.rs` compares every struct and constant that `sterna-rdma` declares with `rdma-sys`,
//!   which takes most of its own from the installed C header;
//! - `tests/one_sided_write.rs` writes into memory that a queue pair of the `ibverbs` crate registered.
//!
//! `rdma/README.md` says why they are witnesses and not the base of Sterna.

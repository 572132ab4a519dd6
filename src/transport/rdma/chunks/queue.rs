//! The order in which parts are evicted.

use std::collections::VecDeque;

use crate::transport::rdma::wire::ChunkRange;

/// Parts in the order of their eviction, each with its last use: parts that the lanes have not reached yet
/// come last, the others least recently used first. One queue serves many evictions; later changes are
/// considered when a part is taken.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) parts: VecDeque<(ChunkRange, u64)>,
    /// The number of uses when it was made.
    pub(super) made_at: u64,
}

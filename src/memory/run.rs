use super::PAGE_BYTES;

/// Consecutive pages of one RAM region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Index of the region.
    pub region: usize,
    /// First page, counted from the region's start.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

impl PageRun {
    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// The same pages in parts of at most `pages_max` pages.
    pub fn split(self, pages_max: u64) -> impl Iterator<Item = PageRun> {
        let end = self.first_page + self.pages;
        (self.first_page..end)
            .step_by(usize::try_from(pages_max.max(1)).unwrap_or(usize::MAX))
            .map(move |first_page| PageRun { first_page, pages: pages_max.min(end - first_page), ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_splits_into_parts_that_cover_it() {
        let run = PageRun { region: 3, first_page: 10, pages: 7 };
        let parts: Vec<_> = run.split(3).map(|part| (part.region, part.first_page, part.pages)).collect();
        assert_eq!(parts, [(3, 10, 3), (3, 13, 3), (3, 16, 1)]);
    }
}

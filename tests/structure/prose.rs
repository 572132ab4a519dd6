//! How the comments are written: words that a newcomer has to think about, in 100,000 words of comments.

/// The count of each group of words.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Prose {
    words: usize,
    counts: [usize; GROUPS.len()],
}

/// A group of words: its name, whether a word with the one before it belongs, and how many there should be at
/// most.
type Group = (&'static str, fn(&str, &str) -> bool, usize);

const GROUPS: [Group; 5] = [
    ("who-whoever", |_, word| matches!(word, "who" | "whoever"), 30),
    ("nobody-somebody", |_, word| matches!(word, "nobody" | "somebody"), 20),
    ("of-it-of-them-of-that", |before, word| before == "of" && matches!(word, "it" | "them" | "that"), 60),
    (
        "is-told-is-said-is-known",
        |before, word| before == "is" && matches!(word, "told" | "said" | "known"),
        40,
    ),
    ("here-there", |_, word| matches!(word, "here" | "there"), 300),
];

impl Prose {
    /// Counts the comments of a file.
    pub(crate) fn read(&mut self, source: &str) {
        let mut before = String::new();
        for comment in source.lines().filter_map(comment) {
            for word in comment.split_whitespace() {
                let plain = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
                if plain.is_empty() {
                    continue;
                }
                self.words += 1;
                for ((_, belongs, _), count) in GROUPS.iter().zip(&mut self.counts) {
                    *count += usize::from(belongs(&before, &plain));
                }
                // A sentence that ends does not go on.
                let ends = word.ends_with(['.', ',', ':', ';', ')', '?']);
                before = if ends { String::new() } else { plain };
            }
        }
    }

    /// Each group with its name, how many there are and should be.
    pub(crate) fn rates(&self) -> impl Iterator<Item = (&'static str, usize, usize)> {
        GROUPS
            .iter()
            .zip(self.counts)
            .map(|((name, _, goal), count)| (*name, count * 100_000 / self.words, *goal))
    }
}

/// The text of a line's comment.
fn comment(line: &str) -> Option<&str> {
    let start = match line.trim_start() {
        whole if whole.starts_with("//") => line.len() - whole.len(),
        _ => {
            let start = line.find(" // ")?;
            // Not within a string.
            line[..start].matches('"').count().is_multiple_of(2).then_some(start)?
        }
    };
    Some(line[start..].trim_start().trim_start_matches(['/', '!']))
}

//! Texts of other processes, made fit for a terminal.

/// The most characters that are shown.
const CHARACTERS_MAX: usize = 1000;

/// The text without control characters, and not too long.
pub(crate) fn shown(text: &str) -> String {
    let mut shown = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == CHARACTERS_MAX {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_debug());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_long_texts_are_cut() {
        assert_eq!(shown("node 'a'\r\n\u{1b}[2J"), "node 'a'\\r\\n\\u{1b}[2J");
        assert_eq!(shown(&"é".repeat(5000)).chars().count(), CHARACTERS_MAX + 1);
    }
}

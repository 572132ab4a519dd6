//! Texts of a peer. They reach terminals and logs, so what would move a cursor, forge a line or reverse the
//! order of characters is escaped or refused where a message is read.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};

/// Reads a text, escaped.
pub(super) fn escaped<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = Cow::<str>::deserialize(deserializer)?;
    Ok(escape(&text))
}

/// The text with every character that is not visible escaped as in a Rust literal.
pub(super) fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_visible(character) {
            shown.push(character);
        } else {
            shown.extend(character.escape_debug());
        }
    }
    shown
}

/// Whether a name can be shown as it is.
pub(super) fn is_shown_as_it_is(name: &str) -> bool {
    name.chars().all(is_visible)
}

fn is_visible(character: char) -> bool {
    // A literal escapes quotes too. A combining mark is visible after the letter to which it belongs.
    let after_letter = || format!("a{character}").escape_debug().count() == 2;
    matches!(character, '"' | '\'' | '\\') || character.escape_debug().len() == 1 || after_letter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_moves_no_cursor_and_begins_no_line() {
        let forged = "full\x1b[2K\r\nwhere: at the destination, running\u{202e}\u{85}\u{200b}";
        assert_eq!(
            escape(forged),
            r"full\u{1b}[2K\r\nwhere: at the destination, running\u{202e}\u{85}\u{200b}"
        );
        let plain = r#"no space on "/données" for «größe» \ 漢字 it's 5 %"#;
        assert_eq!(escape(plain), plain);
    }

    #[test]
    fn a_name_that_would_be_escaped_is_not_shown_as_it_is() {
        for name in ["web-1", "größe 2", "gro\u{308}ße", "a'b"] {
            assert!(is_shown_as_it_is(name), "{name}");
        }
        for name in ["a\nb", "\x1b[31m", "a\u{202e}b", "\u{feff}a", "a\u{a0}b"] {
            assert!(!is_shown_as_it_is(name), "{name:?}");
        }
    }
}

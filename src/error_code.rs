//! Stable codes of errors, for texts that may change.

use std::fmt;

use strum::{EnumMessage, IntoEnumIterator};

/// The code of an error, as `area.name`: `transport.no-device`.
///
/// A code stays the same from version to version, so programs that see errors as text or JSON match on it.
/// `docs/errors.md` lists all codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ErrorCode {
    area: &'static str,
    name: &'static str,
}

impl ErrorCode {
    /// A code from its two parts.
    pub(crate) fn new(area: &'static str, name: &'static str) -> Self {
        Self { area, name }
    }

    /// The first part: which area failed.
    #[must_use]
    pub fn area(self) -> &'static str {
        self.area
    }

    /// The second part: how it failed.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.name
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.area, self.name)
    }
}

/// The codes of one enum's variants, without the variants that take the code of an inner error.
pub(crate) fn codes_of<K>(area: &'static str, passed_on: &[K]) -> Vec<(ErrorCode, &'static str)>
where
    K: IntoEnumIterator + EnumMessage + PartialEq + Into<&'static str> + Copy,
{
    K::iter()
        .filter(|kind| !passed_on.contains(kind))
        .map(|kind| (ErrorCode::new(area, kind.into()), kind.get_documentation().unwrap_or_default().trim()))
        .collect()
}

/// Gives an error enum its codes: `area.` and the variant's name. A variant that is `via` another error has
/// the code of the inner error.
macro_rules! coded {
    ($error:ident, $kinds:ident, $area:literal $(, via $($inner:ident),+)?) => {
        impl $error {
            /// The stable code of this error.
            #[must_use]
            pub fn code(&self) -> $crate::error_code::ErrorCode {
                match self {
                    $($(Self::$inner(inner) => inner.code(),)+)?
                    _ => $crate::error_code::ErrorCode::new($area, $kinds::from(self).into()),
                }
            }

            pub(crate) fn codes() -> Vec<($crate::error_code::ErrorCode, &'static str)> {
                $crate::error_code::codes_of::<$kinds>($area, &[$($($kinds::$inner),+)?])
            }
        }
    };
}

pub(crate) use coded;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::wire::WireError;

    #[test]
    fn every_code_is_there_once_and_has_a_meaning() {
        let all = ErrorCode::all();
        let codes: BTreeSet<_> = all.iter().map(|(code, _)| code.to_string()).collect();
        assert_eq!(codes.len(), all.len());
        for (code, meaning) in all {
            assert!(meaning.ends_with('.'), "{code}: {meaning}");
        }
    }

    #[test]
    fn an_error_that_passes_another_on_has_the_code_of_that() {
        let inner = WireError::Kind(7);
        let (code, text) = (inner.code(), inner.code().to_string());
        assert_eq!(text, "protocol.kind");
        let outer = crate::source::MigrationFailure::Control(inner.into());
        assert_eq!(outer.code(), code);
        assert!(ErrorCode::all().iter().any(|(listed, _)| *listed == code));
    }
}

//! A description of the declarations for the witnesses.

/// A C struct as this crate declares it.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Its name in `<infiniband/verbs.h>`.
    pub name: &'static str,
    /// `sizeof`.
    pub size_bytes: usize,
    /// `_Alignof`.
    pub align_bytes: usize,
    /// The fields in the order of declaration.
    pub fields: Vec<Field>,
}

/// A field of a [`Layout`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in C; a name that starts with an underscore stands for a union or for a field that Sterna
    /// never reads.
    pub name: &'static str,
    /// `offsetof`.
    pub offset_bytes: usize,
}

/// A constant or enumerator as this crate declares it.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    /// Its name in `<infiniband/verbs.h>`.
    pub name: &'static str,
    /// Its value, widened.
    pub value: i64,
}

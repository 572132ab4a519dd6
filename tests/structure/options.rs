//! The options of the command, and texts that name one.

use std::collections::BTreeSet;

use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::{Field, Item};

/// The names of the options that a file of the command declares, without their dashes.
pub(crate) fn options_in(source: &str) -> BTreeSet<String> {
    let file = syn::parse_file(source).expect("the compiler read it");
    let fields = file.items.into_iter().flat_map(|item| match item {
        Item::Struct(item) => item.fields.into_iter().collect::<Vec<_>>(),
        Item::Enum(item) => item.variants.into_iter().flat_map(|variant| variant.fields).collect(),
        _ => Vec::new(),
    });
    fields.filter_map(|field| option_of(&field)).collect()
}

/// Whether a text names one of these options.
pub(crate) fn names_one(text: &str, options: &BTreeSet<String>) -> bool {
    text.split("--").skip(1).any(|after| {
        let end = after.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(after.len());
        options.contains(&after[..end])
    })
}

/// `#[arg(long)]` takes the field's name, `#[arg(long = "name")]` another.
fn option_of(field: &Field) -> Option<String> {
    let attribute = field.attrs.iter().find(|attribute| attribute.path().is_ident("arg"))?;
    let arguments = attribute.meta.require_list().ok()?.tokens.clone().into_iter().collect::<Vec<_>>();
    let long = arguments.iter().position(|token| token.to_string() == "long")?;
    let given = arguments.get(long + 1).filter(|token| token.to_string() == "=").and(arguments.get(long + 2));
    let given = given.map(|literal| TokenStream::from(literal.clone()).to_string().replace('"', ""));
    given.or_else(|| Some(field.ident.to_token_stream().to_string().replace('_', "-")))
}

#[test]
fn options_are_read_from_the_declarations_and_found_in_texts() {
    let options = options_in(
        "struct Arguments { #[arg(long, value_name = \"N\")] state_max: u64, \
         #[arg(short, long = \"to\")] address: String, #[arg(value_name = \"--no\")] name: String }",
    );
    assert_eq!(options, ["state-max", "to"].map(str::to_owned).into());
    assert!(names_one("start it with a larger --state-max", &options));
    assert!(names_one("\"(`--to`)\"", &options));
    assert!(!names_one("ps --sort and --tokens; a--b", &options));
}

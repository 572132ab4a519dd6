//! The modules of each crate as the compiler sees them without `cfg(test)`: items, imports, paths and string
//! literals.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Spacing, TokenStream, TokenTree};
use quote::ToTokens;
use syn::{Attribute, Item, UseTree, Visibility};

/// A crate, with its root module first.
pub(crate) struct Crate {
    pub(crate) modules: Vec<Module>,
}

/// A module: a file, or a block within one.
pub(crate) struct Module {
    pub(crate) file: PathBuf,
    pub(crate) parent: Option<usize>,
    pub(crate) children: BTreeMap<String, Child>,
    /// What the module defines, and whether it is public.
    pub(crate) items: BTreeMap<String, bool>,
    pub(crate) imports: Vec<Import>,
    /// Every path in the code, with at least one name.
    pub(crate) paths: Vec<Vec<String>>,
    /// Every string literal outside of doc comments.
    pub(crate) strings: Vec<String>,
}

/// A child module.
pub(crate) struct Child {
    pub(crate) module: usize,
    /// Part of the documented, stable interface.
    pub(crate) public: bool,
}

/// One name that a `use` item brings into a module.
pub(crate) struct Import {
    pub(crate) path: Vec<String>,
    /// `None` for a glob.
    pub(crate) name: Option<String>,
    pub(crate) reexport: Reexport,
}

/// How far an import is visible.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reexport {
    No,
    WithinTheCrate,
    Public,
}

impl Crate {
    /// Reads a crate from its root file, which is relative to the repository.
    pub(crate) fn read(repository: &Path, root: &str) -> Self {
        let mut this = Self { modules: Vec::new() };
        this.read_file(repository, Path::new(root), None, true);
        this
    }

    fn read_file(&mut self, repository: &Path, file: &Path, parent: Option<usize>, is_root: bool) -> usize {
        let text =
            fs::read_to_string(repository.join(file)).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        // `mod x;` in mod.rs, lib.rs and main.rs lies beside the file, in any other file in a folder of its
        // name.
        let folder = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let folder = if is_root || stem == "mod" { folder } else { folder.join(stem) };
        self.read_items(repository, parsed.items, file, &folder, parent)
    }

    fn read_items(
        &mut self,
        repository: &Path,
        items: Vec<Item>,
        file: &Path,
        folder: &Path,
        parent: Option<usize>,
    ) -> usize {
        let index = self.modules.len();
        self.modules.push(Module {
            file: file.to_path_buf(),
            parent,
            children: BTreeMap::new(),
            items: BTreeMap::new(),
            imports: Vec::new(),
            paths: Vec::new(),
            strings: Vec::new(),
        });
        for item in items.into_iter().flat_map(unstable_expanded) {
            if attributes(&item).iter().any(is_for_tests) {
                continue;
            }
            match item {
                Item::Mod(module) => {
                    let name = module.ident.to_string();
                    let public = is_public(&module.vis) && !module.attrs.iter().any(is_hidden);
                    let child = match module.content {
                        Some((_, items)) => {
                            self.read_items(repository, items, file, &folder.join(&name), Some(index))
                        }
                        None => {
                            let beside = folder.join(format!("{name}.rs"));
                            let within = folder.join(&name).join("mod.rs");
                            let file = if repository.join(&beside).exists() { beside } else { within };
                            self.read_file(repository, &file, Some(index), false)
                        }
                    };
                    self.modules[index].children.insert(name, Child { module: child, public });
                }
                Item::Use(import) => {
                    let reexport = match import.vis {
                        Visibility::Public(_) if !import.attrs.iter().any(is_hidden) => Reexport::Public,
                        Visibility::Public(_) | Visibility::Restricted(_) => Reexport::WithinTheCrate,
                        Visibility::Inherited => Reexport::No,
                    };
                    flatten(&import.tree, &mut Vec::new(), reexport, &mut self.modules[index].imports);
                }
                other => self.modules[index].read_item(other),
            }
        }
        index
    }
}

impl Module {
    fn read_item(&mut self, mut item: Item) {
        if let Some((name, visibility)) = definition(&item) {
            let public = visibility.is_some_and(is_public) && !attributes(&item).iter().any(is_hidden);
            self.items.insert(name, public);
        }
        match &mut item {
            Item::Impl(block) => block.items.retain(|item| !member_attributes(item).iter().any(is_for_tests)),
            Item::Trait(block) => block.items.retain(|item| match item {
                syn::TraitItem::Fn(member) => !member.attrs.iter().any(is_for_tests),
                _ => true,
            }),
            // A variant may have the name of an item.
            Item::Enum(item) => item.variants.iter_mut().for_each(|variant| {
                variant.ident = syn::Ident::new("Variant", variant.ident.span());
            }),
            _ => {}
        }
        self.read_tokens(item.to_token_stream());
    }

    fn read_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        let mut is_member = false;
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(_) if is_member => {}
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.end_path(&mut path);
                    }
                    path.push(name.to_string());
                    colons = 0;
                    continue;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' && !path.is_empty() => {
                    colons += 1;
                    continue;
                }
                TokenTree::Punct(mark) if mark.as_char() == '#' => {
                    let is_doc = |group: &proc_macro2::Group| {
                        group.stream().into_iter().next().is_some_and(|first| first.to_string() == "doc")
                    };
                    if matches!(tokens.peek(), Some(TokenTree::Group(group)) if is_doc(group)) {
                        tokens.next();
                    }
                }
                TokenTree::Group(group) => self.read_tokens(group.stream()),
                TokenTree::Literal(literal) => {
                    let text = literal.to_string();
                    if text.contains('"') {
                        self.strings.push(text);
                    }
                }
                TokenTree::Punct(mark) => {
                    self.end_path(&mut path);
                    (is_member, colons) = (mark.as_char() == '.' && mark.spacing() == Spacing::Alone, 0);
                    continue;
                }
            }
            self.end_path(&mut path);
            (is_member, colons) = (false, 0);
        }
        self.end_path(&mut path);
    }

    fn end_path(&mut self, path: &mut Vec<String>) {
        if !path.is_empty() {
            self.paths.push(std::mem::take(path));
        }
    }
}

/// What `unstable! { … }` holds: visible in the whole crate, and no part of the stable interface.
fn unstable_expanded(item: Item) -> Vec<Item> {
    match item {
        Item::Macro(call) if call.mac.path.is_ident("unstable") => {
            let visible = quote::quote!(pub(crate));
            let mut file: syn::File = syn::parse2(call.mac.tokens).expect("items");
            for item in &mut file.items {
                if let Item::Use(import) = item {
                    import.vis = syn::parse2(visible.clone()).expect("a visibility");
                }
            }
            file.items
        }
        item => vec![item],
    }
}

fn flatten(tree: &UseTree, prefix: &mut Vec<String>, reexport: Reexport, imports: &mut Vec<Import>) {
    let mut add = |path: Vec<String>, name| imports.push(Import { path, name, reexport });
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            flatten(&path.tree, prefix, reexport, imports);
            prefix.pop();
        }
        UseTree::Group(group) => {
            group.items.iter().for_each(|tree| flatten(tree, prefix, reexport, imports));
        }
        UseTree::Glob(_) => add(prefix.clone(), None),
        UseTree::Name(name) if name.ident == "self" => add(prefix.clone(), prefix.last().cloned()),
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            add([prefix.as_slice(), std::slice::from_ref(&name)].concat(), Some(name));
        }
        UseTree::Rename(rename) => {
            let mut path = prefix.clone();
            if rename.ident != "self" {
                path.push(rename.ident.to_string());
            }
            add(path, Some(rename.rename.to_string()));
        }
    }
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// `cfg(test)`, alone or with more.
fn is_for_tests(attribute: &Attribute) -> bool {
    let tokens = attribute.to_token_stream().to_string();
    attribute.path().is_ident("cfg") && tokens.contains("test") && !tokens.contains("not")
}

/// Outside of the stable interface.
fn is_hidden(attribute: &Attribute) -> bool {
    let tokens = attribute.to_token_stream().to_string();
    (attribute.path().is_ident("doc") && tokens.contains("hidden"))
        || (attribute.path().is_ident("cfg") && tokens.contains("unstable") && !tokens.contains("not"))
}

fn member_attributes(item: &syn::ImplItem) -> &[Attribute] {
    match item {
        syn::ImplItem::Const(member) => &member.attrs,
        syn::ImplItem::Fn(member) => &member.attrs,
        syn::ImplItem::Type(member) => &member.attrs,
        _ => &[],
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn definition(item: &Item) -> Option<(String, Option<&Visibility>)> {
    let (name, visibility) = match item {
        Item::Const(item) => (&item.ident, &item.vis),
        Item::Enum(item) => (&item.ident, &item.vis),
        Item::Fn(item) => (&item.sig.ident, &item.vis),
        Item::Static(item) => (&item.ident, &item.vis),
        Item::Struct(item) => (&item.ident, &item.vis),
        Item::Trait(item) => (&item.ident, &item.vis),
        Item::Type(item) => (&item.ident, &item.vis),
        Item::Union(item) => (&item.ident, &item.vis),
        Item::Macro(item) => return item.ident.as_ref().map(|name| (name.to_string(), None)),
        _ => return None,
    };
    Some((name.to_string(), Some(visibility)))
}

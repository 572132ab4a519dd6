//! Which file a path leads to, and what that says of the files: circles, imports through a parent, public
//! items.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::crates::{Crate, Import, Module, Reexport};

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target<'a> {
    Module(usize),
    Item(usize, &'a str),
}

/// Re-exports of re-exports end somewhere.
const DEPTH_MAX: usize = 16;

impl Crate {
    /// The files of each circle of files that use each other's items. Without what a parent uses of its
    /// children, a circle is one between equals.
    pub(crate) fn circles(&self, with_parents: bool) -> Vec<Vec<PathBuf>> {
        let arrows = self.arrows(with_parents);
        let reach: BTreeMap<&Path, BTreeSet<&Path>> =
            arrows.keys().map(|file| (*file, reachable(&arrows, file))).collect();
        let mut seen = BTreeSet::new();
        let mut circles = Vec::new();
        for (file, reached) in &reach {
            if !reached.contains(file) || seen.contains(file) {
                continue;
            }
            let together = |other: &&&Path| reach.get(**other).is_some_and(|back| back.contains(file));
            let circle: Vec<&Path> = reached.iter().filter(together).copied().collect();
            seen.extend(circle.iter().copied());
            circles.push(circle.into_iter().map(Path::to_path_buf).collect());
        }
        circles
    }

    /// Each file with the files that it uses items of.
    pub(crate) fn uses(&self) -> impl Iterator<Item = (PathBuf, PathBuf)> {
        let arrows = self.arrows(true);
        let pairs = arrows.into_iter().flat_map(|(from, to)| {
            to.into_iter().map(|to| (from.to_path_buf(), to.to_path_buf())).collect::<Vec<_>>()
        });
        pairs.collect::<Vec<_>>().into_iter()
    }

    /// Imports of an item through a module above, which itself only imports it.
    pub(crate) fn imports_through_parents(&self) -> BTreeMap<PathBuf, BTreeSet<String>> {
        let mut found: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
        for (index, module) in self.modules.iter().enumerate() {
            let imported = module.imports.iter().map(|import| {
                let mut path = import.path.clone();
                path.extend(import.name.is_none().then(|| "*".to_owned()));
                path
            });
            for path in imported.chain(module.paths.iter().cloned()) {
                if let Some(names) = self.leads_through_a_parent(index, &path) {
                    found.entry(module.file.clone()).or_default().insert(path[..names].join("::"));
                }
            }
        }
        found
    }

    /// The items, without modules, members and variants, that other crates can name.
    pub(crate) fn public_items(&self) -> BTreeSet<String> {
        let mut items = BTreeSet::new();
        self.collect_public(0, &mut BTreeSet::new(), &mut items);
        items
    }

    fn collect_public(&self, index: usize, seen: &mut BTreeSet<usize>, items: &mut BTreeSet<String>) {
        if !seen.insert(index) {
            return;
        }
        let module = &self.modules[index];
        let name = |module: &Module, item: &str| format!("{}: {item}", module.file.display());
        items.extend(module.items.iter().filter(|(_, public)| **public).map(|(item, _)| name(module, item)));
        for child in module.children.values().filter(|child| child.public) {
            self.collect_public(child.module, seen, items);
        }
        for import in module.imports.iter().filter(|import| import.reexport == Reexport::Public) {
            match self.resolve(index, &import.path, DEPTH_MAX) {
                Some(Target::Module(module)) => self.collect_public(module, seen, items),
                Some(Target::Item(at, item)) => {
                    items.insert(name(&self.modules[at], item));
                }
                None => {
                    items.insert(import.path.join("::"));
                }
            }
        }
    }

    /// Which files each file uses items of.
    fn arrows(&self, with_parents: bool) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut arrows: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (index, module) in self.modules.iter().enumerate() {
            let used = module.imports.iter().filter(|import| import.reexport == Reexport::No);
            let used = used.map(|import| &import.path).chain(&module.paths);
            let files = used.filter_map(|path| match self.resolve(index, path, DEPTH_MAX)? {
                Target::Item(at, _) if with_parents || !self.is_above(index, at) => {
                    Some(self.modules[at].file.as_path())
                }
                _ => None,
            });
            let from = arrows.entry(&module.file).or_default();
            from.extend(files.filter(|file| *file != module.file));
        }
        arrows
    }

    fn resolve<'a>(&'a self, from: usize, path: &'a [String], depth: usize) -> Option<Target<'a>> {
        let (first, rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(from),
            "super" => Target::Module(self.modules[from].parent?),
            name => self.look_up(from, name, depth)?,
        };
        for name in rest {
            at = match (at, name.as_str()) {
                (Target::Item(..), _) => return Some(at),
                (Target::Module(module), "super") => Target::Module(self.modules[module].parent?),
                (Target::Module(module), "self") => Target::Module(module),
                (Target::Module(module), name) => self.look_up(module, name, depth)?,
            };
        }
        Some(at)
    }

    fn look_up<'a>(&'a self, index: usize, name: &'a str, depth: usize) -> Option<Target<'a>> {
        let module = &self.modules[index];
        if module.items.contains_key(name) {
            return Some(Target::Item(index, name));
        }
        if let Some(child) = module.children.get(name) {
            return Some(Target::Module(child.module));
        }
        let depth = depth.checked_sub(1)?;
        let named = module.imports.iter().find(|import| import.name.as_deref() == Some(name));
        if let Some(import) = named {
            // `use name::…` does not name itself.
            let itself = import.path.len() == 1;
            return if itself { None } else { self.resolve(index, &import.path, depth) };
        }
        module.imports.iter().filter(|import| import.name.is_none()).find_map(|import| {
            match self.resolve(index, &import.path, depth)? {
                Target::Module(other) if other != index => self.look_up(other, name, depth),
                _ => None,
            }
        })
    }

    /// How many names of the path lead to a module above that only imports what the last of them names.
    fn leads_through_a_parent(&self, from: usize, path: &[String]) -> Option<usize> {
        let mut at = match path[0].as_str() {
            "crate" => 0,
            "super" => self.modules[from].parent?,
            _ => return None,
        };
        for (index, name) in path.iter().enumerate().skip(1) {
            let module = &self.modules[at];
            if name == "super" {
                at = module.parent?;
                continue;
            }
            let is_module = module.children.contains_key(name) && index + 1 < path.len();
            // `use name;` makes a path of a macro.
            let imports = |import: &&Import| import.name.as_ref() == Some(name) && import.path.len() > 1;
            let imports = module.imports.iter().any(|import| imports(&import))
                || (name == "*" && !module.imports.is_empty());
            // A block may use what its file imports.
            let is_above = self.is_above(at, from) && module.file != self.modules[from].file;
            if is_above && !module.items.contains_key(name) && !is_module && imports {
                return Some(index + 1);
            }
            at = module.children.get(name)?.module;
        }
        None
    }

    fn is_above(&self, upper: usize, lower: usize) -> bool {
        let mut at = self.modules[lower].parent;
        while let Some(module) = at {
            if module == upper {
                return true;
            }
            at = self.modules[module].parent;
        }
        false
    }
}

fn reachable<'a>(arrows: &BTreeMap<&'a Path, BTreeSet<&'a Path>>, from: &Path) -> BTreeSet<&'a Path> {
    let mut reached = BTreeSet::new();
    let mut ahead: Vec<&Path> = arrows.get(from).into_iter().flatten().copied().collect();
    while let Some(file) = ahead.pop() {
        if reached.insert(file) {
            ahead.extend(arrows.get(file).into_iter().flatten().copied());
        }
    }
    reached
}

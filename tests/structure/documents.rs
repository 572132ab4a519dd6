//! Whether what the documents point at exists: links, headings, files, functions.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A document of the repository.
pub(crate) struct Document {
    /// Relative to the repository.
    pub(crate) file: PathBuf,
    pub(crate) text: String,
}

impl Document {
    /// What the document points at and is not there.
    pub(crate) fn broken(&self, repository: &Path) -> Vec<String> {
        let file = self.file.display();
        let links = self.links().into_iter().filter(|link| !self.link_leads_somewhere(repository, link));
        let paths = code_spans(&self.prose()).into_iter().filter(|path| !self.path_exists(repository, path));
        let functions = self.functions().into_iter().filter(|(function, in_file)| {
            let text = fs::read_to_string(repository.join(in_file)).unwrap_or_default();
            let defines = ["(", "<"].iter().any(|next| text.contains(&format!("fn {function}{next}")));
            !defines
        });
        let links = links.map(|link| format!("{file}: the link to {link} leads nowhere"));
        let paths = paths.map(|path| format!("{file}: there is no file {path}"));
        let functions = functions.map(|(name, at)| format!("{file}: there is no function {name} in {at}"));
        links.chain(paths).chain(functions).collect()
    }

    /// Options that the document names and the command does not have.
    pub(crate) fn unknown_options(&self, options: &BTreeSet<String>) -> Vec<String> {
        let named = self.text.split_inclusive(char::is_whitespace).flat_map(|word| word.split('`'));
        let named = named.filter_map(|word| word.strip_prefix("--")).map(|word| {
            word.find(|c: char| !c.is_ascii_lowercase() && c != '-').map_or(word, |end| &word[..end])
        });
        // Of other programs, or of all commands.
        let is_known = |name: &str| ["help", "release", "ulimit"].contains(&name) || options.contains(name);
        let unknown =
            named.filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()) && !is_known(name));
        unknown.map(|name| format!("{}: there is no option --{name}", self.file.display())).collect()
    }

    /// The text without blocks of code.
    fn prose(&self) -> String {
        let mut within_code = false;
        let is_prose = |line: &&str| {
            let is_fence = line.trim_start().starts_with("```");
            within_code ^= is_fence;
            !within_code && !is_fence
        };
        self.text.lines().filter(is_prose).collect::<Vec<_>>().join("\n")
    }

    fn links(&self) -> Vec<String> {
        let prose = self.prose();
        let ends = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        ends.map(|(link, _)| link.to_owned()).filter(|link| !link.contains("://")).collect()
    }

    fn link_leads_somewhere(&self, repository: &Path, link: &str) -> bool {
        let (path, heading) = link.split_once('#').unwrap_or((link, ""));
        let folder = self.file.parent().unwrap_or(Path::new(""));
        let target = if path.is_empty() { self.file.clone() } else { folder.join(path) };
        let target = repository.join(target);
        if heading.is_empty() {
            return target.exists();
        }
        let headings = |text: String| -> BTreeSet<String> {
            text.lines().filter(|line| line.starts_with('#')).map(anchor).collect()
        };
        fs::read_to_string(target).is_ok_and(|text| headings(text).contains(heading))
    }

    /// Paths are relative to the repository, or to the folder of the document.
    fn path_exists(&self, repository: &Path, path: &str) -> bool {
        let folder = self.file.parent().unwrap_or(Path::new(""));
        repository.join(path).exists() || repository.join(folder).join(path).exists()
    }

    /// The functions named as "`function` in `file`".
    fn functions(&self) -> Vec<(String, String)> {
        let prose = self.prose();
        let named = prose.match_indices("` in `").filter_map(|(at, between)| {
            let function = prose[..at].rsplit('`').next()?;
            let file = prose[at + between.len()..].split('`').next()?;
            let is_file = file.ends_with(".rs") && !function.contains('/');
            let function = function.rsplit("::").next()?;
            is_file.then(|| (function.to_owned(), file.to_owned()))
        });
        named.collect()
    }
}

/// The texts between backticks that look like a file or a folder of this repository.
fn code_spans(prose: &str) -> Vec<String> {
    let is_path = |span: &&str| {
        let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "/_-.".contains(c));
        plain
            && span.contains('/')
            && (span.ends_with(".rs") || span.starts_with("src/"))
            && !span.starts_with('/')
    };
    prose.split('`').skip(1).step_by(2).filter(is_path).map(str::to_owned).collect()
}

/// A heading's anchor as forges make it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

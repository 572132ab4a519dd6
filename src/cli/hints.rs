//! Remedies for errors in terms of this command's options, by the error's code.
//!
//! The library's errors name no option, because a VMM that embeds the library has others.

/// The remedy for an error of this code, if it goes beyond the error's text.
pub(crate) fn hint(code: &str) -> Option<&'static str> {
    HINTS.iter().find(|(of, _)| *of == code).map(|(_, hint)| *hint)
}

const HINTS: &[(&str, &str)] = &[
    ("connection.connect", "start `sterna receive` on that host, and let the port through its firewall"),
    ("connection.resolve", "see whether the name is right: `getent ahosts NAME`"),
    (
        "connection.keys-needed",
        "leave `--insecure` out, and let the hosts trust each other: `sterna trust show` and `sterna trust add` on each",
    ),
    (
        "connection.key-not-trusted",
        "`sterna trust add NAME FINGERPRINT` on this host, if it is the right key",
    ),
    (
        "connection.key-not-trusted-there",
        "`sterna trust add NAME FINGERPRINT` on that host, with this host's key",
    ),
    ("connection.not-allowed", "`sterna trust add` that host again with a `--may` that includes it"),
    (
        "connection.other-host",
        "see whether the address is still that host's; a new key of it is added under its old name",
    ),
    (
        "connection.tls-missing",
        "start the other side without `--insecure`, or both with it; `sterna trust help` says how hosts trust each other",
    ),
    (
        "connection.tls-required",
        "leave `--insecure` out; `sterna trust help` says how hosts trust each other",
    ),
    ("dirty-log.rings", "run the guest without `--dirty-log ring`"),
    (
        "migration.not-converging",
        "change the limits of the next attempt, or of one under way by `sterna migrate NAME --set LIMIT=VALUE`; \
         `sterna dirty-rate NAME` predicts what each does",
    ),
    ("migration.state-too-long", "a larger `--state-max` of `sterna migrate` and of `sterna receive`"),
    ("migration.timed-out", "a larger `--timeout`, or `--if-stuck stop` to switch when the time is over"),
    ("protocol.not-sterna", "give `--to` the address at which `sterna receive` listens"),
    ("protocol.version", "run the same version of sterna on both hosts"),
    ("refused.busy", "wait for that guest, or start another `sterna receive` there with another `--port`"),
    ("refused.file-exists", "another `--into` of `sterna receive`, or `--force` to replace the file"),
    ("refused.lock-missing", "start `sterna receive` there with `--lock FILE`, the file of the source"),
    ("refused.lock-unknown", "start `sterna receive` there without `--lock`, or run the guest with it"),
    ("refused.memory", "free memory at the destination, or choose another host"),
    ("refused.not-allowed", "`sterna trust add` this host again there, with a `--may` that includes it"),
    (
        "refused.other-host",
        "ask from the host that began it; a new key of that host is added there under its old name",
    ),
    ("refused.name-taken", "stop that guest, or give this one another name there: `sterna receive --name`"),
    ("refused.only-guests", "start `sterna receive --into PATH` there to receive a file"),
    ("refused.only-images", "start `sterna receive` there without `--into` to receive a guest"),
    ("refused.space", "free room on that file system, or receive into another one by `--into`"),
    (
        "refused.transport",
        "`sterna check` at the destination says what RDMA lacks there (locked memory: `ulimit -l unlimited`; systemd: \
         LimitMEMLOCK=infinity; container: --ulimit memlock=-1); or use `--transport tcp`",
    ),
    ("saved-state.too-long", "start `sterna receive` with a larger `--state-max`"),
    ("start.elsewhere", "to start or adopt another guest of that name: `--new`"),
    (
        "start.in-doubt",
        "`sterna recover NAME` settles what became of it; to start or adopt another guest of that name: `--new`",
    ),
    ("state.claimed", "let that process end, or choose another name"),
    (
        "state.crowded",
        "at the destination, `sterna list --all` says where its guests are; their files are in its state folder",
    ),
    ("store.exists", "`--force` replaces it"),
    (
        "transport.locked-memory",
        "raise the limit by `ulimit -l unlimited` (systemd: LimitMEMLOCK=infinity; container: --ulimit memlock=-1) or by \
         `--pin-limit`, or use `--transport tcp`",
    ),
    ("transport.no-device", "`sterna check` says how to get one; or use `--transport tcp`"),
    (
        "transport.not-registered",
        "let this process lock enough memory (`ulimit -l unlimited`; systemd: LimitMEMLOCK=infinity; container: --ulimit \
         memlock=-1), and see that the host has it, or use `--transport tcp`",
    ),
    ("transport.scarce-memory", "free memory, raise the control group's limit, or use `--transport tcp`"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write;
    use std::path::Path;

    use clap::CommandFactory;
    use sterna::error_code::ErrorCode;

    use super::*;
    use crate::cli::Sterna;

    #[test]
    fn a_hint_belongs_to_an_error_and_names_commands_and_options_that_exist() {
        let codes: BTreeSet<_> = ErrorCode::all().iter().map(|(code, _)| code.to_string()).collect();
        let command = Sterna::command();
        let options: BTreeSet<_> = command
            .get_subcommands()
            .flat_map(|command| std::iter::once(command).chain(command.get_subcommands()))
            .flat_map(clap::Command::get_arguments)
            .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
            .collect();
        for (code, hint) in HINTS {
            assert!(codes.contains(*code), "no error has the code {code}");
            for named in hint.split('`').skip(1).step_by(2).filter_map(|code| code.strip_prefix("sterna ")) {
                let name = named.split_whitespace().next().unwrap_or_default();
                assert!(command.find_subcommand(name).is_some(), "{code}: no command sterna {name}");
            }
            // Words outside backticks belong to other programs.
            for word in hint.split('`').skip(1).step_by(2).flat_map(str::split_whitespace) {
                assert!(!word.starts_with("--") || options.contains(word), "{code}: no option {word}");
            }
        }
    }

    /// `STERNA_WRITE_DOCS=1` writes the page anew.
    #[test]
    fn the_page_of_errors_is_that_of_the_code() {
        let page = page();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors.md");
        if std::env::var_os("STERNA_WRITE_DOCS").is_some() {
            std::fs::write(&path, &page).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == page,
            "docs/errors.md is out of date: STERNA_WRITE_DOCS=1 cargo test page_of_errors"
        );
    }

    fn page() -> String {
        let mut page = HEAD.to_owned();
        let mut area = "";
        for (code, meaning) in ErrorCode::all() {
            if code.area() != area {
                area = code.area();
                let _ = write!(page, "\n## {area}\n\n| code | meaning | what mends it |\n|---|---|---|\n");
            }
            let hint = hint(&code.to_string()).unwrap_or_default().replace('|', "\\|");
            let meaning = plain(meaning);
            let _ = writeln!(page, "| `{code}` | {meaning} | {hint} |");
        }
        page
    }

    /// A sentence of the documentation without its links.
    fn plain(text: &str) -> String {
        let text = text.replace('\n', " ").replace("(GuestIs::InDoubt)", "");
        text.replace("[`", "`").replace("`]", "`").replace(['[', ']'], "").replace('|', "\\|")
    }

    const HEAD: &str = "\
# Errors

Each error has a code that stays the same from version to version. The library gives it by `code()`, the command prints it
with `--json` and in the line `code:`. The text of an error may change, and carries the figures.

This page is made from the code (`src/cli/hints.rs`).
";
}

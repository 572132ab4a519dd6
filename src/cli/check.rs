//! `sterna check`: whether this machine can migrate guests, and a remedy for each problem.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::process::ExitCode;

use sterna::host::KvmAccess;

use crate::cli::preflight::{Check, KvmCapabilities, Outcome, Readings, Transports, judge};
use clap::Args;
use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::exit::Exit;
use super::output::outln;

/// The options of `sterna check`.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct CheckArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Exit with 1 on a warning; otherwise only failures count (11)
    #[arg(long)]
    strict: bool,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs) -> ExitCode {
    let mut readings = Readings::take();
    if readings.kvm.access == KvmAccess::Usable {
        readings.kvm.capabilities = kvm_capabilities();
    }
    let report = Report::of(&readings);
    let text = if args.json { report.json() } else { report.text(Paint::for_stdout()) };
    // Without a reader the exit code still tells the result.
    outln!("{}", text.trim_end());
    report.exit_code(args.strict)
}

fn kvm_capabilities() -> Option<KvmCapabilities> {
    let kvm = Kvm::new().ok()?;
    Some(KvmCapabilities {
        api_version: kvm.get_api_version(),
        manual_dirty_log_protect: kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()),
    })
}

/// The report of the command; serialised, its JSON.
#[derive(Debug, Serialize)]
struct Report {
    /// The worst result of the checks.
    outcome: Outcome,
    checks: Vec<Check>,
    transports: Transports,
}

impl Report {
    fn of(readings: &Readings) -> Self {
        let checks = judge(readings);
        let outcome = checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Pass);
        Self { outcome, checks, transports: Transports::of(readings) }
    }

    fn exit_code(&self, strict: bool) -> ExitCode {
        match self.outcome {
            Outcome::Fail => Exit::Refused.into(),
            Outcome::Warn if strict => ExitCode::from(1),
            Outcome::Pass | Outcome::Info | Outcome::Warn => Exit::Done.into(),
        }
    }

    fn json(&self) -> String {
        serde_json::to_string(self).expect("strings, lists and enums always serialise") + "\n"
    }

    fn text(&self, paint: Paint) -> String {
        let id_width = self.checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
        let mut text = String::new();
        let mut group = "";
        for check in &self.checks {
            if check.group() != group {
                group = check.group();
                line(&mut text, format_args!("{}", paint.bold(title(group))));
            }
            let mark = paint.mark(check.outcome);
            line(&mut text, format_args!("  {mark} {:id_width$}  {}", check.id, check.found));
            if let Some(remedy) = &check.remedy {
                line(&mut text, format_args!("    {:id_width$}  {} {remedy}", "", paint.dim("mend:")));
            }
        }
        line(&mut text, format_args!("{}", self.transports_line()));
        text
    }

    fn transports_line(&self) -> String {
        let Transports { rdma, soft_roce, tcp: _ } = &self.transports;
        let mut ways = Vec::new();
        if !rdma.is_empty() {
            ways.push(format!("rdma by {}", rdma.join(", ")));
        }
        if !soft_roce.is_empty() {
            ways.push(format!("rdma in software (soft-RoCE) by {}", soft_roce.join(", ")));
        }
        ways.push("tcp, which works anywhere".to_owned());
        format!("Guests can move from and to this machine by: {}", ways.join("; "))
    }
}

fn title(group: &str) -> &str {
    match group {
        "kvm" => "KVM",
        "memory" => "Memory",
        "rdma" => "RDMA",
        "network" => "Network",
        other => other,
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    writeln!(text, "{content}").expect("a string takes all that is written to it");
}

/// Whether to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    Plain,
    Colour,
}

impl Paint {
    /// According to <https://no-color.org>.
    fn for_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !refused { Self::Colour } else { Self::Plain }
    }

    fn mark(self, outcome: Outcome) -> String {
        match outcome {
            Outcome::Pass => self.wrap("32", "✓"),
            Outcome::Info => self.wrap("2", "·"),
            Outcome::Warn => self.wrap("33", "!"),
            Outcome::Fail => self.wrap("31", "✗"),
        }
    }

    fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// `code` is a parameter of the terminal's "select graphic rendition".
    fn wrap(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: &[Outcome]) -> Report {
        let checks: Vec<Check> = outcomes
            .iter()
            .map(|&outcome| Check {
                id: "memory.locked",
                outcome,
                found: "8 MiB may be locked".to_owned(),
                remedy: (outcome > Outcome::Info).then(|| "ulimit -l unlimited".to_owned()),
            })
            .collect();
        let outcome = outcomes.iter().copied().max().unwrap_or(Outcome::Pass);
        Report {
            outcome,
            checks,
            transports: Transports { soft_roce: vec!["rxe0".to_owned()], tcp: true, rdma: vec![] },
        }
    }

    fn code(outcomes: &[Outcome], strict: bool) -> String {
        format!("{:?}", report(outcomes).exit_code(strict))
    }

    #[test]
    fn warnings_count_only_when_strict_and_failures_always() {
        let done = format!("{:?}", ExitCode::from(0));
        assert_eq!(code(&[Outcome::Pass, Outcome::Warn], false), done);
        assert_eq!(code(&[Outcome::Pass, Outcome::Info], true), done);
        assert_eq!(code(&[Outcome::Warn, Outcome::Pass], true), format!("{:?}", ExitCode::from(1)));
        assert_eq!(code(&[Outcome::Fail, Outcome::Warn], true), format!("{:?}", ExitCode::from(11)));
        assert_eq!(code(&[Outcome::Fail], false), format!("{:?}", ExitCode::from(11)));
    }

    #[test]
    fn text_puts_a_remedy_under_what_was_found_and_ends_with_the_transports() {
        let text = report(&[Outcome::Pass, Outcome::Warn]).text(Paint::Plain);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "Memory",
                "  ✓ memory.locked  8 MiB may be locked",
                "  ! memory.locked  8 MiB may be locked",
                "                   mend: ulimit -l unlimited",
                "Guests can move from and to this machine by: rdma in software (soft-RoCE) by rxe0; tcp, which works anywhere",
            ]
        );
        assert!(!text.contains('\x1b'));
        assert!(report(&[Outcome::Fail]).text(Paint::Colour).contains("\x1b[31m✗\x1b[0m"));
    }

    #[test]
    fn json_is_one_line_with_checks_and_transports() {
        let json = report(&[Outcome::Warn]).json();
        assert_eq!(json.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&json).expect("our own JSON");
        assert_eq!(value["outcome"], "WARN");
        assert_eq!(value["checks"][0]["id"], "memory.locked");
        assert_eq!(value["checks"][0]["remedy"], "ulimit -l unlimited");
        assert_eq!(value["transports"]["soft_roce"][0], "rxe0");
        assert_eq!(value["transports"]["tcp"], true);
    }
}

//! What every kernel has to keep to, and those that may not, each for a reason.

use crate::counted::Counted;
use crate::resources::Resources;
use crate::table;
use std::fmt;

/// Sectors are shares of bytes that threads asked for, at least.
const SECTORS_USED: f64 = 0.95;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// Nothing spilled, on any architecture.
    Spills,
    /// No shared-memory access takes extra passes.
    Conflicts,
    /// Global accesses use at least [`SECTORS_USED`] of the sectors that they touch.
    Sectors,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Spills => "no spills",
            Limit::Conflicts => "no bank conflicts",
            Limit::Sectors => "95 % of sectors used",
        })
    }
}

/// Kernels that need not keep a limit: a `*` in the name stands for anything.
struct Exception {
    kernels: &'static str,
    limit: Limit,
    why: &'static str,
}

const EXCEPTIONS: [Exception; 7] = [
    Exception {
        kernels: "*_unaligned",
        limit: Limit::Sectors,
        why: "for rows that start at no multiple of 16 bytes: it reads element by element, and is counted on such rows",
    },
    Exception {
        kernels: "nf4_lora_linear_forward_*",
        limit: Limit::Sectors,
        why: "rows of a tile lie far apart in absmax, and a slice of 64 columns needs one of a sector's 8 statistics; \
              the next slices find the sector in cache",
    },
    Exception {
        kernels: "lora_linear_skinny_*",
        limit: Limit::Sectors,
        why: "the update's factors are read a word per row; they are small beside W",
    },
    Exception {
        kernels: "lora_linear_skinny_*",
        limit: Limit::Conflicts,
        why: "at the end, where warps add up their sums: after the main loop, which uses no shared memory",
    },
    Exception {
        kernels: "adamw_8bit",
        limit: Limit::Conflicts,
        why: "codes and their boundaries are looked up in tables by value, so lanes meet as chance wills",
    },
    Exception {
        kernels: "*_transposed",
        limit: Limit::Sectors,
        why: "a token's column of an embedding's A, whose layout is PEFT's: each element is alone in a sector",
    },
    Exception {
        kernels: "cross_entropy_sum",
        limit: Limit::Sectors,
        why: "one block, one result of 4 bytes",
    },
];

impl Exception {
    fn covers(&self, kernel: &str, limit: Limit) -> bool {
        let named = match self.kernels.split_once('*') {
            Some((head, tail)) => kernel.starts_with(head) && kernel.ends_with(tail),
            None => kernel == self.kernels,
        };
        named && limit == self.limit
    }
}

/// The kernels that break a limit without an exception, and the exceptions that no kernel needs, in words.
pub fn broken(resources: &[Resources], counted: &[Counted]) -> Vec<String> {
    let found: Vec<(&str, Limit, String)> = breaches(resources, counted).collect();
    let excused = |kernel: &str, limit| EXCEPTIONS.iter().any(|own| own.covers(kernel, limit));
    let broken = found
        .iter()
        .filter(|(kernel, limit, _)| !excused(kernel, *limit))
        .map(|(kernel, limit, found)| format!("{kernel}: {found}, and the limit is {limit}"));
    let needed = |own: &Exception| {
        found
            .iter()
            .any(|(kernel, limit, _)| own.covers(kernel, *limit))
    };
    let stale = EXCEPTIONS.iter().filter(|own| !needed(own)).map(|own| {
        format!(
            "{}: the exception from {} is not needed any more",
            own.kernels, own.limit
        )
    });
    broken.chain(stale).collect()
}

/// The limits that kernels do not keep, with what was found.
fn breaches<'a>(
    resources: &'a [Resources],
    counted: &'a [Counted],
) -> impl Iterator<Item = (&'a str, Limit, String)> {
    let spills = resources
        .iter()
        .filter(|own| own.spill_bytes > 0)
        .map(|own| {
            let found = format!("{} bytes spilled on {}", own.spill_bytes, own.arch);
            (own.kernel, Limit::Spills, found)
        });
    let conflicts = counted
        .iter()
        .filter(|own| own.conflicts_per_access() > 0.0)
        .map(|own| {
            let found = format!("{:.3} conflicts per access", own.conflicts_per_access());
            (own.kernel.as_str(), Limit::Conflicts, found)
        });
    let sectors = counted
        .iter()
        .filter(|own| own.sectors_used() < SECTORS_USED)
        .map(|own| {
            let found = format!("{:.1} % of sectors used", 100.0 * own.sectors_used());
            (own.kernel.as_str(), Limit::Sectors, found)
        });
    spills.chain(conflicts).chain(sectors)
}

/// The section of the report.
pub fn markdown() -> String {
    let exceptions = table(
        &["kernels", "limit", "why it is not kept"],
        EXCEPTIONS.iter().map(|own| {
            vec![
                format!("`{}`", own.kernels),
                own.limit.to_string(),
                own.why.to_owned(),
            ]
        }),
    );
    format!(
        "\n## Limits\n\n\
         No kernel spills registers, no access to shared memory meets another in a bank, and at least 95 % of the \
         sectors that global accesses touch are used, on the shapes above; `cargo xtask kernels --check` fails \
         otherwise. Exceptions:\n\n{exceptions}"
    )
}

//! `init_lora_weights`: how fresh weights come about.

use std::fmt;

use serde_json::{Value, json};

/// How fresh weights come about. A fresh adapter changes nothing, except for `RandomBoth`, `Loftq`, and rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform with `a = sqrt(5)`, so within `1 / sqrt(in_features)`; B zero.
    KaimingUniform,
    /// `"gaussian"`: A normal with standard deviation `1 / rank`; B zero.
    Gaussian,
    /// `false`: A and B both Kaiming-uniform; the fresh adapter changes the model.
    RandomBoth,
    /// `"orthogonal"`: A and B of rows of one orthogonal matrix, so that `B·A` is zero though neither is.
    Orthogonal,
    /// `"pissa"`, `"pissa_niter_N"`: the principal part of the weight, which the base is left without (Meng et al. 2024).
    Pissa {
        /// Of a randomised decomposition (Halko et al. 2011) in place of the exact one.
        iterations: Option<usize>,
    },
    /// `"olora"`: the first columns of Q and rows of R of the weight, which the base is left without (Büyükakyüz 2024).
    Olora,
    /// `"loftq"`: what NF4 loses of the weight; the base is left in NF4's values (Li et al. 2023).
    Loftq {
        /// `loftq_iter`: quantizations, each of what the update before does not hold.
        iterations: usize,
    },
}

impl InitLoraWeights {
    /// The initialisation of this name, `true` and `false` among them.
    pub fn from_name(name: &str) -> Option<InitLoraWeights> {
        let lower = name.to_lowercase();
        Some(match &lower[..] {
            "true" => InitLoraWeights::KaimingUniform,
            "false" => InitLoraWeights::RandomBoth,
            "gaussian" => InitLoraWeights::Gaussian,
            "orthogonal" => InitLoraWeights::Orthogonal,
            "pissa" => InitLoraWeights::Pissa { iterations: None },
            "olora" => InitLoraWeights::Olora,
            "loftq" => InitLoraWeights::Loftq { iterations: 1 },
            _ => InitLoraWeights::Pissa {
                iterations: Some(lower.strip_prefix("pissa_niter_")?.parse().ok()?),
            },
        })
    }

    /// Whether an adapted module has a base of its own in place of the model's weight.
    pub fn replaces_base(self) -> bool {
        self.subtracts() || matches!(self, InitLoraWeights::Loftq { .. })
    }

    /// Whether that base is the weight without the update as it was at first.
    pub(in super::super) fn subtracts(self) -> bool {
        matches!(self, InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora)
    }

    pub(super) fn to_json(self) -> Value {
        match self {
            InitLoraWeights::KaimingUniform => json!(true),
            InitLoraWeights::RandomBoth => json!(false),
            named => json!(named.to_string()),
        }
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            InitLoraWeights::KaimingUniform => formatter.write_str("true"),
            InitLoraWeights::Gaussian => formatter.write_str("gaussian"),
            InitLoraWeights::RandomBoth => formatter.write_str("false"),
            InitLoraWeights::Orthogonal => formatter.write_str("orthogonal"),
            InitLoraWeights::Pissa { iterations: None } => formatter.write_str("pissa"),
            InitLoraWeights::Pissa {
                iterations: Some(n),
            } => write!(formatter, "pissa_niter_{n}"),
            InitLoraWeights::Olora => formatter.write_str("olora"),
            InitLoraWeights::Loftq { .. } => formatter.write_str("loftq"),
        }
    }
}

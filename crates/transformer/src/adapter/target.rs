//! Which modules an adapter changes, with which rank and scaling: PEFT's matching rules.
//!
//! Source: `check_target_module_exists` in PEFT's `tuners_utils.py` and `get_pattern_key` in `utils/other.py`.

use regex::Regex;

use super::{AdapterConfig, ModuleSelector};
use crate::error::{Error, Result};
use crate::families::OUTPUT_HEAD;

/// A module of a model that an adapter can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// What its input has: features, or the tokens that an embedding knows.
    pub in_features: usize,
    /// What its output has.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Whether its weight is the token embedding's table: a head that shares it.
    pub tied: bool,
}

/// What a module computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// `x·Wᵀ + bias`, stored `[out_features, in_features]`.
    Linear,
    /// The same, stored `[in_features, out_features]`: GPT-2's.
    Conv1d,
    /// Rows of a table `[in_features, out_features]` by index.
    Embedding,
    /// A normalisation, with a weight `[out_features]`.
    Norm,
}

impl Module {
    /// The shape of its weight as the model holds it.
    pub(crate) fn weight_shape(&self) -> Vec<usize> {
        match self.kind {
            ModuleKind::Linear | ModuleKind::Conv1d => vec![self.out_features, self.in_features],
            ModuleKind::Embedding => vec![self.in_features, self.out_features],
            ModuleKind::Norm => vec![self.out_features],
        }
    }

    /// Number of its values in the model; none where it shares another's.
    pub fn parameter_count(&self) -> usize {
        let weight: usize = self.weight_shape().iter().product();
        let bias = if self.bias { self.out_features } else { 0 };
        if self.tied { 0 } else { weight + bias }
    }

    /// Whether a low-rank update fits.
    fn takes_update(&self) -> bool {
        self.kind != ModuleKind::Norm
    }
}

/// A module that gets an update.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The module's path.
    pub module: String,
    /// Columns of its weight.
    pub in_features: usize,
    /// Rows of its weight.
    pub out_features: usize,
    /// Rank of the update.
    pub rank: usize,
    /// Factor of the update.
    pub scaling: f32,
    /// Whether magnitudes are trained too.
    pub use_dora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// What the module computes.
    pub kind: ModuleKind,
}

impl Target {
    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        let vectors = usize::from(self.use_dora) + usize::from(self.lora_bias);
        self.rank * (self.in_features + self.out_features) + vectors * self.out_features
    }
}

impl AdapterConfig {
    /// The modules that this configuration adapts, in the order of `linear`.
    ///
    /// # Errors
    /// When a name, a pattern or a layer index fits no module (the error lists what would), or a regular
    /// expression is invalid.
    pub fn resolve(&self, modules: &[Module]) -> Result<Vec<Target>> {
        if let ModuleSelector::Names(names) = &self.target_modules {
            for name in names {
                let fits = |module: &Module| module.takes_update() && ends_in(&module.name, name);
                if !modules.iter().any(fits) {
                    return Err(Error::adapter(format!(
                        "`target_modules` \"{name}\" fits no linear module; {}",
                        what_fits(modules)
                    )));
                }
            }
        }
        let targets = self.targets(modules)?;
        self.check_patterns(&targets)?;
        self.check_trained(modules, &targets)?;
        Ok(targets)
    }

    /// As [`AdapterConfig::resolve`], but an entry may fit nothing as long as another does: PEFT wrote such
    /// adapters, and their tensors say what is meant.
    pub(super) fn targets(&self, modules: &[Module]) -> Result<Vec<Target>> {
        self.check()?;
        let rank_pattern = suffix_patterns("rank_pattern", &self.rank_pattern)?;
        let alpha_pattern = suffix_patterns("alpha_pattern", &self.alpha_pattern)?;
        let target = |module: &Module| {
            let rank = first_match(&rank_pattern, &module.name).unwrap_or(self.rank);
            let alpha = first_match(&alpha_pattern, &module.name).unwrap_or(self.alpha);
            let divisor = if self.use_rslora {
                (rank as f64).sqrt()
            } else {
                rank as f64
            };
            Target {
                module: module.name.clone(),
                in_features: module.in_features,
                out_features: module.out_features,
                rank,
                scaling: (alpha / divisor) as f32,
                use_dora: self.use_dora,
                lora_bias: self.lora_bias,
                kind: module.kind,
            }
        };
        let targets: Vec<Target> = self.select(modules)?.into_iter().map(target).collect();
        for target in &targets {
            self.check_target(target)?;
        }
        Ok(targets)
    }

    /// Fails where this module cannot have the update that is asked for.
    fn check_target(&self, target: &Target) -> Result<()> {
        if target.kind != ModuleKind::Embedding {
            return Ok(());
        }
        let refused = if self.use_dora {
            "DoRA on an embedding is not supported"
        } else if self.lora_bias {
            "`lora_bias` is not for embeddings"
        } else {
            return Ok(());
        };
        Err(Error::adapter(format!("`{}`: {refused}", target.module)))
    }

    /// Fails where a pattern fits no adapted module, or a layer's index is none: it would silently do nothing.
    fn check_patterns(&self, targets: &[Target]) -> Result<()> {
        let fitting = once_each(
            targets
                .iter()
                .map(|target| last_part(&target.module))
                .collect(),
        );
        let ranks = self
            .rank_pattern
            .iter()
            .map(|(pattern, _)| ("rank_pattern", pattern));
        let alphas = self
            .alpha_pattern
            .iter()
            .map(|(pattern, _)| ("alpha_pattern", pattern));
        for (key, pattern) in ranks.chain(alphas) {
            let regex = suffix_regex(key, pattern)?;
            if !targets.iter().any(|target| regex.is_match(&target.module)) {
                return Err(Error::adapter(format!(
                    "`{key}` \"{pattern}\" fits no adapted module; these would: {fitting}"
                )));
            }
        }
        let indices = self.layer_indices()?;
        for layer in self.layers_to_transform.iter().flatten() {
            if !targets
                .iter()
                .any(|target| layer_index(&indices, &target.module) == Some(*layer))
            {
                return Err(Error::adapter(format!(
                    "`layers_to_transform` {layer} is the index of no adapted layer"
                )));
            }
        }
        Ok(())
    }

    fn select<'a>(&self, modules: &'a [Module]) -> Result<Vec<&'a Module>> {
        let updatable = modules.iter().filter(|module| module.takes_update());
        let mut chosen: Vec<&Module> = match &self.target_modules {
            ModuleSelector::AllLinear => updatable
                .filter(|module| module.kind != ModuleKind::Embedding && module.name != OUTPUT_HEAD)
                .collect(),
            ModuleSelector::Regex(pattern) => {
                let regex = full_regex("target_modules", pattern)?;
                updatable
                    .filter(|module| regex.is_match(&module.name))
                    .collect()
            }
            ModuleSelector::Names(names) => updatable
                .filter(|module| names.iter().any(|name| ends_in(&module.name, name)))
                .collect(),
        };
        for name in &self.modules_to_save {
            let regex = compile("modules_to_save", &format!(r"\A(?:|.*\.){name}(?:\z|\..*)"))?;
            chosen.retain(|module| !regex.is_match(&module.name));
        }
        if let Some(layers) = &self.layers_to_transform {
            let indices = self.layer_indices()?;
            chosen.retain(|module| {
                layer_index(&indices, &module.name).is_some_and(|index| layers.contains(&index))
            });
        }
        match &self.exclude_modules {
            None => {}
            Some(ModuleSelector::Names(names)) => {
                chosen.retain(|module| !names.iter().any(|name| ends_in(&module.name, name)));
            }
            Some(ModuleSelector::Regex(pattern)) => {
                let regex = full_regex("exclude_modules", pattern)?;
                chosen.retain(|module| !regex.is_match(&module.name));
            }
            Some(ModuleSelector::AllLinear) => chosen.clear(),
        }
        if chosen.is_empty() {
            let asked = match &self.target_modules {
                ModuleSelector::AllLinear => "\"all-linear\"".to_owned(),
                ModuleSelector::Names(names) => format!("{names:?}"),
                ModuleSelector::Regex(pattern) => format!("\"{pattern}\""),
            };
            let message = format!(
                "`target_modules` {asked}, less what is excluded, chooses no linear module; {}",
                what_fits(modules)
            );
            return Err(Error::adapter(message));
        }
        Ok(chosen)
    }

    /// Expressions that capture a layer's index in a module's path, tried in turn.
    fn layer_indices(&self) -> Result<Vec<Regex>> {
        if self.layers_pattern.is_empty() {
            return Ok(vec![compile(
                "layers_pattern",
                r"\A.*?\.[^.]*\.(?<index>\d+)\.",
            )?]);
        }
        self.layers_pattern
            .iter()
            .map(|pattern| {
                compile(
                    "layers_pattern",
                    &format!(r"\A(?:|.*?\.){pattern}\.(?<index>\d+)\."),
                )
            })
            .collect()
    }
}

fn ends_in(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns
        .iter()
        .find(|(regex, _)| regex.is_match(path))
        .map(|&(_, value)| value)
}

fn suffix_patterns<T: Copy>(key: &str, patterns: &[(String, T)]) -> Result<Vec<(Regex, T)>> {
    patterns
        .iter()
        .map(|(pattern, value)| Ok((suffix_regex(key, pattern)?, *value)))
        .collect()
}

fn suffix_regex(key: &str, pattern: &str) -> Result<Regex> {
    compile(key, &format!(r"\A(?:.*\.)?(?:{pattern})\z"))
}

/// The index of the layer that a module belongs to.
fn layer_index(indices: &[Regex], module: &str) -> Option<usize> {
    indices
        .iter()
        .find_map(|regex| regex.captures(module))?
        .name("index")?
        .as_str()
        .parse()
        .ok()
}

pub(super) fn full_regex(key: &str, pattern: &str) -> Result<Regex> {
    compile(key, &format!(r"\A(?:{pattern})\z"))
}

fn compile(key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|error| {
        let reason = error.to_string();
        let reason = reason
            .lines()
            .last()
            .unwrap_or_default()
            .trim_start_matches("error: ");
        Error::adapter(format!(
            "`{key}` is no regular expression that can be read here: {reason}"
        ))
    })
}

/// A sentence with the last parts of the modules' paths.
fn what_fits(modules: &[Module]) -> String {
    format!(
        "these would: {}",
        once_each(
            modules
                .iter()
                .filter(|module| module.takes_update())
                .map(|module| last_part(&module.name))
                .collect()
        )
    )
}

fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

fn once_each(mut names: Vec<&str>) -> String {
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

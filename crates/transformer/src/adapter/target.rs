//! Which modules an adapter changes, with which rank and scaling: PEFT's matching rules.
//!
//! Source: `check_target_module_exists` in PEFT's `tuners_utils.py` and `get_pattern_key` in `utils/other.py`.

use regex::Regex;

use super::{AdapterConfig, ModuleSelector};
use crate::error::{Error, Result};

/// A linear module of a model that can be adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearModule {
    /// Its path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of its weight.
    pub in_features: usize,
    /// Rows of its weight.
    pub out_features: usize,
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
}

impl Target {
    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        let magnitude = if self.use_dora { self.out_features } else { 0 };
        self.rank * (self.in_features + self.out_features) + magnitude
    }
}

/// The output head, which `all-linear` leaves out.
const OUTPUT_HEAD: &str = "lm_head";

impl AdapterConfig {
    /// The modules that this configuration adapts, in the order of `linear`.
    ///
    /// # Errors
    /// When a name, a pattern or a layer index fits no module (the error lists what would), or a regular
    /// expression is invalid.
    pub fn resolve(&self, linear: &[LinearModule]) -> Result<Vec<Target>> {
        if let ModuleSelector::Names(names) = &self.target_modules {
            for name in names {
                if !linear.iter().any(|module| ends_in(&module.name, name)) {
                    return Err(Error::adapter(format!(
                        "`target_modules` \"{name}\" fits no linear module; {}",
                        what_fits(linear)
                    )));
                }
            }
        }
        let targets = self.targets(linear)?;
        self.check_patterns(&targets)?;
        Ok(targets)
    }

    /// As [`AdapterConfig::resolve`], but an entry may fit nothing as long as another does: PEFT wrote such
    /// adapters, and their tensors say what is meant.
    pub(super) fn targets(&self, linear: &[LinearModule]) -> Result<Vec<Target>> {
        self.check()?;
        let rank_pattern = suffix_patterns("rank_pattern", &self.rank_pattern)?;
        let alpha_pattern = suffix_patterns("alpha_pattern", &self.alpha_pattern)?;
        let target = |module: &LinearModule| {
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
            }
        };
        Ok(self.select(linear)?.into_iter().map(target).collect())
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

    fn select<'a>(&self, linear: &'a [LinearModule]) -> Result<Vec<&'a LinearModule>> {
        let mut chosen: Vec<&LinearModule> = match &self.target_modules {
            ModuleSelector::AllLinear => linear
                .iter()
                .filter(|module| module.name != OUTPUT_HEAD)
                .collect(),
            ModuleSelector::Regex(pattern) => {
                let regex = full_regex("target_modules", pattern)?;
                linear
                    .iter()
                    .filter(|module| regex.is_match(&module.name))
                    .collect()
            }
            ModuleSelector::Names(names) => linear
                .iter()
                .filter(|module| names.iter().any(|name| ends_in(&module.name, name)))
                .collect(),
        };
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
                what_fits(linear)
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

fn full_regex(key: &str, pattern: &str) -> Result<Regex> {
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
fn what_fits(linear: &[LinearModule]) -> String {
    format!(
        "these would: {}",
        once_each(
            linear
                .iter()
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

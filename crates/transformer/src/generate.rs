//! Continuing a prompt token by token.

use std::ops::ControlFlow;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::lora::{AdapterRows, Lora, Pass};
use crate::model::Model;

/// How the next token is chosen, and when to stop.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// 0 takes the most likely token; above, logits are divided by it before sampling.
    pub temperature: f32,
    /// Sample from the smallest set of tokens whose probabilities reach this sum (Holtzman et al. 2020).
    pub top_p: f32,
    /// Seed of the sampling.
    pub seed: u64,
    /// Tokens that end the answer; they are not part of it.
    pub stop_tokens: Vec<u32>,
}

/// A prompt, and the adapter that answers it.
pub struct Request<'a> {
    /// The prompt's tokens.
    pub prompt: &'a [u32],
    /// The adapter, if any.
    pub lora: Option<&'a Lora>,
}

/// Continues `prompt`; returns the new tokens. `on_token` sees each as it comes and may stop.
///
/// # Errors
/// An empty prompt, a token outside the vocabulary, or no room on the device.
pub fn generate(
    model: &Model,
    lora: Option<&Lora>,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let requests = [Request { prompt, lora }];
    let mut answers = generate_all(model, &requests, options, |_, token| on_token(token))?;
    Ok(answers.pop().unwrap_or_default())
}

/// Continues each request, all in one pass over the frozen weights for each new token, whatever their adapters; returns
/// the new tokens of each. Each is sampled as it would be alone. `on_token` sees each token with its request's index and
/// may stop that request.
///
/// # Errors
/// As [`generate`]; or adapters that [`Lora::check_mixed`] does not admit, unless all requests have the same one.
pub fn generate_all(
    model: &Model,
    requests: &[Request<'_>],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Vec<u32>>> {
    if requests.iter().any(|request| request.prompt.is_empty()) {
        return Err(Error::Input("the prompt has no tokens".into()));
    }
    let shared = shared_adapter(requests);
    if shared.is_none() {
        let adapters = requests.iter().filter_map(|request| request.lora);
        adapters
            .into_iter()
            .try_for_each(|lora| lora.check_mixed(model))?;
    }
    let capacities: Vec<usize> = requests
        .iter()
        .map(|request| request.prompt.len() + options.max_new_tokens)
        .collect();
    let mut cache = model.new_cache(&capacities)?;
    let mut answers = vec![Vec::new(); requests.len()];
    let mut rngs = vec![ChaCha8Rng::seed_from_u64(options.seed); requests.len()];
    // The requests that go on, in the order of the cache.
    let mut live: Vec<usize> = match options.max_new_tokens {
        0 => Vec::new(),
        _ => (0..requests.len()).collect(),
    };
    while !live.is_empty() {
        let newest: Vec<&[u32]> = live
            .iter()
            .map(|&index| match answers[index].last() {
                None => requests[index].prompt,
                Some(token) => std::slice::from_ref(token),
            })
            .collect();
        let mixed = match shared {
            Some(_) => Vec::new(),
            None => adapter_rows(requests, &live, &newest),
        };
        let pass = Pass {
            lora: shared.flatten(),
            mixed: &mixed,
            ..Pass::default()
        };
        let logits = model
            .next_logits(&newest, &mut cache, &pass)?
            .to_f32_vec()?;
        let vocab_size = logits.len() / live.len();
        for (row, logits) in logits.chunks_exact(vocab_size).enumerate().rev() {
            let index = live[row];
            let token = choose(logits, options, &mut rngs[index])?;
            let mut ends = options.stop_tokens.contains(&token);
            if !ends {
                answers[index].push(token);
                ends = on_token(index, token).is_break()
                    || answers[index].len() == options.max_new_tokens;
            }
            if ends {
                live.remove(row);
                cache.remove(row);
            }
        }
    }
    Ok(answers)
}

/// The adapter, or none, that all requests have, if they have the same.
fn shared_adapter<'a>(requests: &[Request<'a>]) -> Option<Option<&'a Lora>> {
    let (first, others) = requests.split_first()?;
    let address = |request: &Request<'a>| request.lora.map(std::ptr::from_ref);
    let same = others.iter().all(|other| address(other) == address(first));
    same.then_some(first.lora)
}

/// Which of the concatenated tokens have which adapter.
fn adapter_rows<'a>(
    requests: &[Request<'a>],
    live: &[usize],
    newest: &[&[u32]],
) -> Vec<AdapterRows<'a>> {
    let mut end = 0;
    let rows = live.iter().zip(newest).filter_map(|(&index, tokens)| {
        let tokens = end..end + tokens.len();
        end = tokens.end;
        let lora = requests[index].lora?;
        Some(AdapterRows { tokens, lora })
    });
    AdapterRows::merged(rows)
}

fn choose(logits: &[f32], options: &GenerateOptions, rng: &mut ChaCha8Rng) -> Result<u32> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::Input(
            "the model gives NaN logits: its weights or the adapter hold a NaN".into(),
        ));
    }
    Ok(if options.temperature > 0.0 {
        sample(logits, options.temperature, options.top_p, rng.random())
    } else {
        // The first of equals, as torch.argmax has it.
        let best = logits.iter().enumerate().fold(
            0,
            |best, (i, logit)| if *logit > logits[best] { i } else { best },
        );
        best as u32
    })
}

/// The token at `uniform` (in [0, 1)) of the tempered distribution cut to its `top_p` head.
fn sample(logits: &[f32], temperature: f32, top_p: f32, uniform: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut probabilities: Vec<(u32, f64)> = (0..)
        .zip(
            logits
                .iter()
                .map(|logit| f64::from((logit - max) / temperature).exp()),
        )
        .collect();
    probabilities.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = probabilities.iter().map(|(_, p)| p).sum();
    let mut head = 0.0;
    let kept = probabilities.iter().position(|(_, p)| {
        head += p;
        head >= f64::from(top_p) * total
    });
    probabilities.truncate(kept.map_or(probabilities.len(), |last| last + 1));
    let mut left = uniform * probabilities.iter().map(|(_, p)| p).sum::<f64>();
    for (token, p) in &probabilities {
        left -= p;
        if left < 0.0 {
            return *token;
        }
    }
    // Rounding can leave a crumb of the last token's share.
    probabilities.last().map_or(0, |(token, _)| *token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn samples_follow_the_tempered_distribution(logits in prop::collection::vec(-3f32..3.0, 1..6), t in 0.5f32..2.0) {
            let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / t).exp()).collect();
            let total: f64 = weights.iter().sum();
            let n = 20_000;
            let mut counts = vec![0usize; logits.len()];
            for i in 0..n {
                counts[sample(&logits, t, 1.0, (i as f64 + 0.5) / n as f64) as usize] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                prop_assert!((*count as f64 / n as f64 - weight / total).abs() < 2.0 / n as f64 + 1e-6);
            }
        }

        #[test]
        fn top_p_keeps_only_the_head(u in 0f64..1.0) {
            // Probabilities 0.6, 0.3, 0.1.
            let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
            prop_assert_eq!(sample(&logits, 1.0, 0.5, u), 1);
            prop_assert_ne!(sample(&logits, 1.0, 0.85, u), 0);
        }
    }
}

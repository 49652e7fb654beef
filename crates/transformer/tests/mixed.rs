//! Rows of a batch with adapters of their own, against PEFT's `adapter_names`.

use std::ops::ControlFlow;
use std::path::Path;

use fuselora_tensor::{DType, Device};
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::generate::{GenerateOptions, Request, generate, generate_all};
use fuselora_transformer::lora::{AdapterRows, Lora, Pass};
use fuselora_transformer::model::Model;
use safetensors::SafeTensors;

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests");
const ADAPTERS: [&str; 2] = [
    "parity/linear-rope/adapter-trained",
    "parity/layers-pattern/adapter-trained",
];

struct Case {
    model: Model,
    loras: Vec<Lora>,
    /// Of each row: 0 for none, else one more than its index.
    adapters: Vec<u32>,
    rows: Vec<Vec<u32>>,
    logits: Vec<f32>,
    answers: Vec<Vec<u32>>,
}

fn words<T>(bytes: &[u8], word: fn([u8; 4]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().copied().map(word).collect()
}

fn lora(model: &Model, folder: &str) -> Lora {
    let folder = Path::new(TESTS).join(folder);
    let adapter = Adapter::read(&folder, model.modules(), model.device()).unwrap();
    Lora::bind(adapter, model).unwrap()
}

impl Case {
    fn load(device: &Device) -> Case {
        let tests = Path::new(TESTS);
        let base = Checkpoint::open(tests.join("parity/linear-rope/base")).unwrap();
        let model = Model::load(&base, device, DType::F32).unwrap();
        let bytes = std::fs::read(tests.join("mixed/case.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let indices = |name: &str| {
            let tensor = file.tensor(name).unwrap();
            let values = words(tensor.data(), u32::from_le_bytes);
            let width = tensor.shape().get(1).copied().unwrap_or(1);
            values
                .chunks(width)
                .map(<[u32]>::to_vec)
                .collect::<Vec<_>>()
        };
        Case {
            loras: ADAPTERS.iter().map(|folder| lora(&model, folder)).collect(),
            adapters: indices("adapters").concat(),
            rows: indices("tokens"),
            logits: words(file.tensor("logits").unwrap().data(), f32::from_le_bytes),
            answers: indices("answers"),
            model,
        }
    }

    /// The adapter of a row.
    fn lora(&self, row: usize) -> Option<&Lora> {
        let index = (self.adapters[row] as usize).checked_sub(1)?;
        Some(&self.loras[index])
    }

    fn batch(&self, rows: &[Vec<u32>]) -> Batch {
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        Batch::new(self.model.device(), &rows.concat(), &lengths, &[], &[]).unwrap()
    }

    fn mixed_logits(&self) -> Vec<f32> {
        let mut end = 0;
        let mixed = AdapterRows::merged(self.rows.iter().enumerate().filter_map(|(row, ids)| {
            let tokens = end..end + ids.len();
            end = tokens.end;
            Some(AdapterRows {
                tokens,
                lora: self.lora(row)?,
            })
        }));
        let pass = Pass {
            mixed: &mixed,
            ..Pass::default()
        };
        let logits = self.model.logits(&self.batch(&self.rows), &pass).unwrap();
        logits.to_f32_vec().unwrap()
    }

    fn requests(&self) -> Vec<Request<'_>> {
        let request = |(row, prompt): (usize, &'_ Vec<u32>)| Request {
            prompt: &self.rows[row][..prompt.len()],
            lora: self.lora(row),
        };
        self.rows.iter().enumerate().map(request).collect()
    }
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (difference / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt()
}

fn options(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens,
        temperature: 0.0,
        top_p: 1.0,
        seed: 3,
        stop_tokens: vec![],
    }
}

fn check(device: &Device) {
    let case = Case::load(device);
    let error = relative_error(&case.mixed_logits(), &case.logits);
    assert!(error < 1e-5, "{error:e}");
    let answers = generate_all(
        &case.model,
        &case.requests(),
        &options(case.answers[0].len()),
        |_, _| ControlFlow::Continue(()),
    );
    assert_eq!(answers.unwrap(), case.answers);
}

#[test]
fn a_mixed_batch_is_pefts() {
    check(&Device::cpu());
}

#[cfg(feature = "cuda")]
#[test]
fn a_mixed_batch_is_pefts_on_a_device() {
    ptxsim_driver::select("h100").unwrap();
    check(&Device::cuda(0).unwrap());
}

/// Sampled with the same seed, ended by a token or by who asked, beside others or alone.
#[test]
fn an_answer_does_not_depend_on_its_neighbours() {
    let case = Case::load(&Device::cpu());
    let mut options = GenerateOptions {
        temperature: 1.5,
        ..options(12)
    };
    let alone = |options: &GenerateOptions| -> Vec<Vec<u32>> {
        let requests = case.requests();
        let answer = |request: &Request| {
            let (lora, prompt) = (request.lora, request.prompt);
            generate(&case.model, lora, prompt, options, |_| {
                ControlFlow::Continue(())
            })
            .unwrap()
        };
        requests.iter().map(answer).collect()
    };
    let all = |options: &GenerateOptions, most: [usize; 2]| {
        let mut counts = [0; 2];
        let answers = generate_all(&case.model, &case.requests(), options, |index, _| {
            let Some(count) = counts.get_mut(index) else {
                return ControlFlow::Continue(());
            };
            *count += 1;
            if *count == most[index] {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        answers.unwrap()
    };
    let free = alone(&options);
    assert_eq!(all(&options, [99, 99]), free);
    let mut cut = free.clone();
    cut[0].truncate(2);
    cut[1].truncate(5);
    assert_eq!(all(&options, [2, 5]), cut);
    options.stop_tokens = vec![free[2][3], free[4][7]];
    let stopped = alone(&options);
    assert!(stopped[2].len() <= 3 && stopped[4].len() <= 7);
    assert_eq!(all(&options, [99, 99]), stopped);
}

#[test]
fn what_cannot_share_a_batch_is_named() {
    let refused = |base: &str, adapter: &str| {
        let base = Checkpoint::open(Path::new(TESTS).join(base)).unwrap();
        let model = Model::load(&base, &Device::cpu(), DType::F32).unwrap();
        let refused = lora(&model, adapter).check_mixed(&model);
        refused.expect_err("it is refused").to_string()
    };
    for (case, what) in [
        ("dora-dropout", "DoRA's magnitudes"),
        ("lora-bias", "what is trained whole"),
        ("lora-embedding", "an update of `"),
        ("modules-to-save", "what is trained whole"),
    ] {
        let said = refused(
            &format!("parity/{case}/base"),
            &format!("parity/{case}/adapter-trained"),
        );
        assert!(
            said.contains(what) && said.contains("by itself"),
            "{case}: {said}"
        );
    }
}

//! What adapters cost at inference: switching from one to another between calls, a batch whose rows have many, and a
//! merged model beside its base.
//!
//!     cargo run --release --package fuselora-transformer --example adapter_speed -- MODEL ADAPTER
//!
//! MODEL is a Hugging Face folder or a GGUF file, ADAPTER one of PEFT's for it; f32, on the CPU. Everything is measured in
//! turns, and the medians are printed with their ratio.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use fuselora_tensor::{DType, Device};
use fuselora_transformer::adapter::Adapter;
use fuselora_transformer::batch::Batch;
use fuselora_transformer::checkpoint::Checkpoint;
use fuselora_transformer::generate::{GenerateOptions, generate};
use fuselora_transformer::lora::{AdapterRows, Lora, Pass};
use fuselora_transformer::merge::merge_adapter;
use fuselora_transformer::model::Model;

type Failure = Box<dyn std::error::Error>;

const ROUNDS: usize = 41;
const PROMPT: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
const NEW_TOKENS: usize = 32;
const ROWS: usize = 64;
const ADAPTERS: usize = 16;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("which model and adapter? adapter_speed MODEL ADAPTER".into());
    };
    let cpu = Device::cpu();
    let checkpoint = Checkpoint::open(&path)?;
    let model = Model::load(&checkpoint, &cpu, DType::F32)?;
    let read = || Adapter::read(Path::new(&folder), model.modules(), &cpu);
    let loras = (0..ADAPTERS)
        .map(|_| Lora::bind(read()?, &model))
        .collect::<Result<Vec<_>, _>>()?;
    println!(
        "{} adapted modules, {} parameters",
        loras[0].module_count(),
        loras[0].parameter_count()
    );

    let batch = Batch::new(&cpu, &PROMPT, &[PROMPT.len()], &[0], &[0])?;
    let call = Cell::new(0);
    let step = |switches: bool| -> Result<(), Failure> {
        call.set(call.get() + usize::from(switches));
        let pass = Pass {
            lora: Some(&loras[call.get() % 2]),
            ..Pass::default()
        };
        model.logits(&batch, &pass)?;
        Ok(())
    };
    let [same, switched] = in_turns([&mut || step(false), &mut || step(true)])?;

    println!(
        "a pass of {} tokens: {same:.3} ms with the adapter of the call before, {switched:.3} ms with another: {:+.3} ms",
        PROMPT.len(),
        switched - same
    );

    let batch = Batch::new(&cpu, &[7; ROWS], &[1; ROWS], &[0], &[0])?;
    let of_rows = ROWS / ADAPTERS;
    let rows: Vec<AdapterRows> = loras
        .iter()
        .enumerate()
        .map(|(index, lora)| AdapterRows {
            tokens: index * of_rows..(index + 1) * of_rows,
            lora,
        })
        .collect();
    let one = Pass {
        lora: Some(&loras[0]),
        ..Pass::default()
    };
    let many = Pass {
        mixed: &rows,
        ..Pass::default()
    };
    let run = |pass: &Pass| -> Result<(), Failure> {
        model.logits(&batch, pass)?;
        Ok(())
    };
    let [of_one, of_many] = in_turns([&mut || run(&one), &mut || run(&many)])?;
    println!(
        "a pass of {ROWS} rows: {of_one:.2} ms with one adapter, {of_many:.2} ms with {ADAPTERS}: {:.3} x",
        of_many / of_one
    );

    let merged_folder = tempfile::tempdir()?;
    merge_adapter(
        &checkpoint,
        &read()?,
        merged_folder.path(),
        Some(DType::F32),
    )?;
    let merged = Model::load(&Checkpoint::open(merged_folder.path())?, &cpu, DType::F32)?;
    let options = GenerateOptions {
        max_new_tokens: NEW_TOKENS,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
        stop_tokens: vec![],
    };
    let run = |model: &Model| -> Result<(), Failure> {
        generate(
            model,
            None,
            &PROMPT,
            &options,
            |_| ControlFlow::Continue(()),
        )?;
        Ok(())
    };
    let [of_base, of_merged] = in_turns([&mut || run(&model), &mut || run(&merged)])?;
    println!(
        "{NEW_TOKENS} tokens: {of_base:.1} ms by the base, {of_merged:.1} ms merged: {:.3} x",
        of_merged / of_base
    );
    Ok(())
}

type Work<'a> = &'a mut dyn FnMut() -> Result<(), Failure>;

/// Median milliseconds of each, done in turns.
fn in_turns(mut works: [Work; 2]) -> Result<[f64; 2], Failure> {
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        for (work, times) in works.iter_mut().zip(&mut times) {
            let start = Instant::now();
            work()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

//! What is refused, and how; and that no text makes the reader panic.

mod support;

use proptest::prelude::*;
use ptxsim::{LaunchConfig, LoadError};
use support::*;

fn refused(body: &str) -> LoadError {
    let ptx = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<4>;\n\
         .reg .f32 %f<4>;\n{body}\n}}\n"
    );
    match gpu().load(&ptx) {
        Ok(_) => panic!("loaded: {body}"),
        Err(error) => error,
    }
}

#[test]
fn unknown_opcodes_and_modifiers_are_named() {
    let error = refused("frobnicate.u32 %r1, %r2;");
    assert!(error.message.contains("`frobnicate`"), "{error}");
    assert_eq!((error.line, error.column), (8, 1));
    let error = refused("add.frob.f32 %f1, %f2, %f3;");
    assert!(error.message.contains("`.frob`"), "{error}");
    let error = refused("  add.s32 %r1, %r2, %q3;");
    assert!(error.message.contains("`%q3`"), "{error}");
    assert_eq!(error.column, 21);
    assert!(
        error
            .to_string()
            .ends_with("  add.s32 %r1, %r2, %q3;\n                      ^"),
        "{error}"
    );
    let error = refused("add.s64 %r1, %r2, %r3;");
    assert!(error.message.contains("width"), "{error}");
    let error = refused("bra nowhere;");
    assert!(error.message.contains("`nowhere`"), "{error}");
}

#[test]
fn newer_targets_are_refused() {
    let error = match gpu().load(".version 8.0\n.target sm_90a\n.address_size 64\n") {
        Ok(_) => panic!("an A100 has loaded sm_90a"),
        Err(error) => error,
    };
    assert!(error.message.contains("sm_90a"), "{error}");
}

/// One line of the text changed in one of several ways.
fn mutated(text: &str, at: usize, kind: u8, byte: u8) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let at = at % bytes.len();
    match kind {
        0 => bytes[at] = byte,
        1 => {
            bytes.remove(at);
        }
        2 => bytes.insert(at, byte),
        3 => bytes.truncate(at),
        _ => {
            let end = (at + usize::from(byte)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn mutated_text_never_panics(at: usize, kind in 0u8..5, byte in 1u8..128, more in any::<usize>()) {
        for text in [BASICS, MATMUL] {
            let once = mutated(text, at, kind, byte);
            let _ = gpu().load(&once);
            let _ = gpu().load(&mutated(&once, more, kind, byte));
        }
    }

    /// What still loads must run without a panic too, to its end or to a fault.
    #[test]
    fn mutated_kernels_never_panic(at in 0usize..1200, byte in prop::sample::select(b"0123456789[]%.,abr".to_vec())) {
        let start = BASICS.find(".entry saxpy").unwrap();
        let end = start + BASICS[start..].find("\n}").unwrap();
        let mut bytes = BASICS.as_bytes().to_vec();
        let at = start + at % (end - start);
        bytes[at] = byte;
        let gpu = gpu();
        if let Ok(module) = gpu.load(&String::from_utf8_lossy(&bytes))
            && let Some(kernel) = module.kernel("saxpy")
            && kernel.params().len() == 4
        {
            let x = upload(&gpu, &[1.0f32; 64]);
            let config = LaunchConfig { block: [64, 1, 1], ..LaunchConfig::default() };
            let _ = gpu.launch(&kernel, &config, &args![kernel, 64i32, 1.0f32, x.0, x.0]);
        }
    }
}

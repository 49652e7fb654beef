//! The driver's own copy on the device, the ceiling of what memory can move. Shapes are `[bytes]`.

use crate::case::{Case, Scope};
use crate::device::Buffer;
use cudarc::driver::result::memcpy_dtod_async;
use fuselora_kernels::{Element, Kernels, LaunchError};

pub fn cases(scope: Scope) -> Vec<Case> {
    let bytes: u32 = match scope {
        Scope::Tiny => 1 << 16,
        Scope::Quick | Scope::Full => 1 << 30,
    };
    vec![Case {
        name: "copy",
        shape: vec![bytes],
        element: Element::U8,
        bytes: 2 * u64::from(bytes),
        flops: 0,
        make: Box::new(move |device| {
            let from = device.random(Element::U8, bytes.into())?;
            let mut to = device.empty(Element::U8, bytes.into())?;
            Ok(Box::new(move |kernels| copy(kernels, &from, &mut to)))
        }),
    }]
}

fn copy(kernels: &Kernels, from: &Buffer, to: &mut Buffer) -> Result<(), LaunchError> {
    let (from, to) = (from.operand(), to.operand_mut());
    let (target, source, len) = (to.address(), from.address(), from.len() as usize);
    // SAFETY: both hold as many bytes, and are freed in the stream's order.
    unsafe { memcpy_dtod_async(target, source, len, kernels.stream().cu_stream()) }?;
    Ok(())
}

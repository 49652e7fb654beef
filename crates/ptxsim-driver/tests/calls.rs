//! Calls beyond plain launches and copies, through cudarc unmodified.

mod support;

use cudarc::driver::sys::{
    self, CUfunction_attribute_enum as FunctionAttribute, CUpointer_attribute, CUresult,
};
use cudarc::driver::{CudaContext, DevicePtr, DeviceRepr, DriverError, PushKernelArg};
use std::ffi::c_void;
use support::*;

/// A tensor map as a kernel's argument.
#[repr(transparent)]
struct Map(sys::CUtensorMap);
// SAFETY: 128 bytes without padding, which is what the kernel takes.
unsafe impl DeviceRepr for Map {}

/// The map of `[rows, columns]` 16-bit elements, in boxes of `[8, 64]` swizzled by 128 bytes.
fn map(address: u64, rows: u64, columns: u64) -> Map {
    // SAFETY: plain bytes, all of which the call sets.
    let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    let (dims, strides) = ([columns, rows], [2 * columns]);
    let (extent, steps) = ([64u32, 8], [1u32; 2]);
    // SAFETY: the arrays have as many elements as the rank says.
    ok(unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            extent.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    });
    Map(map)
}

#[test]
fn tensor_maps_move_boxes() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    let (rows, columns) = (12u64, 72u64);
    let source: Vec<u16> = (0..rows * columns).map(|i| i as u16 + 1).collect();
    let from = stream.clone_htod(&source).unwrap();
    let to = stream.alloc_zeros::<u16>(source.len()).unwrap();
    let mut plain = stream.alloc_zeros::<u32>(256).unwrap();
    let maps = [&from, &to].map(|buffer| map(buffer.device_ptr(&stream).0, rows, columns));
    let copy = function(&context, HOPPER, "tensor_copy");
    let mut launch = stream.launch_builder(&copy);
    launch
        .arg(&maps[0])
        .arg(&maps[1])
        .arg(&mut plain)
        .arg(&8i32)
        .arg(&3i32);
    // SAFETY: the arguments are the kernel's; its accesses are checked.
    unsafe { launch.launch(threads(1, 256)) }.unwrap();
    // The box at (8, 3) of `from` now lies at (8, 1) of `to`.
    let moved = stream.clone_dtoh(&to).unwrap();
    for (i, got) in moved.iter().enumerate() {
        let (row, column) = (i as u64 / columns, i as u64 % columns);
        let inside = (1..9).contains(&row) && column >= 8;
        let expected = match inside {
            true => source[i + 2 * columns as usize],
            false => 0,
        };
        assert_eq!(*got, expected, "{row}, {column}");
    }
}

#[test]
fn extended_launches_make_clusters() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    // A kernel for any cluster: each block reads the word of the next.
    let ptx = HOPPER.replace(".reqnctapercluster 2, 1, 1", "");
    let exchange = function(&context, &ptx, "cluster_exchange");
    let out = stream.alloc_zeros::<u32>(256).unwrap();
    let launch = |cluster: u32| {
        let mut address = out.device_ptr(&stream).0;
        let mut arguments = [(&raw mut address).cast::<c_void>()];
        // SAFETY: plain data whose zero is valid; the dimensions follow.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim.x = cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: 4,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 64,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the argument is the kernel's, and the buffer holds 4 blocks of 64 words.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                exchange.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
    };
    // Four blocks are no whole number of clusters of three.
    assert_eq!(launch(3), CUresult::CUDA_ERROR_INVALID_VALUE);
    ok(launch(2));
    let expected: Vec<u32> = (0..256).map(|i| 1000 * ((i / 64) ^ 1) + i % 64).collect();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);
}

#[test]
fn planes_are_copied_by_rows() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    let host: Vec<u8> = (0..100).collect();
    let device = stream.alloc_zeros::<u8>(64).unwrap();
    let mut copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 2,
        srcY: 1,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: host.as_ptr().cast(),
        srcDevice: 0,
        srcArray: std::ptr::null_mut(),
        srcPitch: 10,
        dstXInBytes: 4,
        dstY: 1,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: device.device_ptr(&stream).0,
        dstArray: std::ptr::null_mut(),
        dstPitch: 16,
        WidthInBytes: 5,
        Height: 3,
    };
    // SAFETY: both planes hold the rows that are copied.
    ok(unsafe { sys::cuMemcpy2D_v2(&copy) });
    let got = stream.clone_dtoh(&device).unwrap();
    for (i, got) in got.iter().enumerate() {
        let (row, column) = (i / 16, i % 16);
        let inside = (1..4).contains(&row) && (4..9).contains(&column);
        let expected = match inside {
            true => host[10 * row + column - 2],
            false => 0,
        };
        assert_eq!(*got, expected, "{row}, {column}");
    }
    // A row too many for the device's side.
    copy.Height = 4;
    // SAFETY: the driver checks the device's side.
    let refused = unsafe { sys::cuMemcpy2D_v2(&copy) };
    assert_eq!(refused, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn pinned_memory_and_what_pointers_are() {
    let _guard = exclusively();
    let context = context();
    let stream = context.default_stream();
    let memory_type = |address: u64| {
        let mut kind = 0u32;
        // SAFETY: the attribute is a 32-bit number.
        let result = unsafe {
            sys::cuPointerGetAttribute(
                (&raw mut kind).cast(),
                CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                address,
            )
        };
        (result, kind)
    };
    // SAFETY: it is written before it is read.
    let mut pinned = unsafe { context.alloc_pinned::<f32>(64) }.unwrap();
    let address = pinned.as_ptr().unwrap() as u64;
    pinned.as_mut_slice().unwrap().fill(2.5);
    let device = stream.clone_htod(&pinned).unwrap();
    assert_eq!(stream.clone_dtoh(&device).unwrap(), [2.5; 64]);
    stream.memset_zeros(&mut device.clone()).unwrap();
    stream.memcpy_dtoh(&device, &mut pinned).unwrap();
    assert_eq!(pinned.as_slice().unwrap(), [2.5; 64]);

    let on_device = device.device_ptr(&stream).0 + 16;
    assert_eq!(memory_type(on_device), (CUresult::CUDA_SUCCESS, 2));
    assert_eq!(memory_type(address + 16), (CUresult::CUDA_SUCCESS, 1));
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: both places are valid.
    ok(unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, on_device) });
    assert_eq!((base, bytes), (on_device - 16, 256));
    drop(pinned);
    let own = 0u8;
    for address in [address, (&raw const own) as u64] {
        assert_eq!(memory_type(address).0, CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn occupancy_follows_the_scarcest_resource() {
    let _guard = exclusively();
    let context = context();
    let add = function(&context, VECTORS, "add");
    let blocks = |threads, shared| {
        add.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None)
            .unwrap()
    };
    // 2048 threads, 32 blocks, 228 KiB.
    assert_eq!(blocks(1024, 0), 2);
    assert_eq!(blocks(32, 0), 32);
    assert_eq!(blocks(32, 40 << 10), 5);
    let (grid, block) = {
        extern "C" fn none(_block: i32) -> usize {
            0
        }
        add.occupancy_max_potential_block_size(none, 0, 0, None)
            .unwrap()
    };
    assert_eq!((grid, block), (2 * 132, 1024));
    // 65536 registers of which a thread may take 128 by `.maxnreg`, and 64 by `.minnctapersm`.
    let kernel = |directives: &str| {
        let body = (1..300)
            .map(|i| format!("add.u32 %r{i}, %r0, {i};"))
            // All of them are live here.
            .chain((1..300).map(|i| format!("add.u32 %r0, %r0, %r{i};")))
            .collect::<String>();
        let ptx = format!(
            ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry many() {directives} \
             {{ .reg .b32 %r<300>; mov.u32 %r0, 0; {body} ret; }}"
        );
        function(&context, &ptx, "many")
    };
    let limited = |directives: &str| {
        let many = kernel(directives);
        let registers = many
            .get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS)
            .unwrap();
        let resident = many.occupancy_max_active_blocks_per_multiprocessor(256, 0, None);
        (registers, resident.unwrap())
    };
    assert_eq!(limited(""), (255, 1));
    assert_eq!(limited(".maxnreg 128"), (128, 2));
    assert_eq!(limited(".maxntid 256 .minnctapersm 4"), (64, 4));
}

#[test]
fn the_watchdog_ends_an_endless_kernel() {
    let _guard = exclusively();
    let simulator = ptxsim_driver::select("h100").unwrap();
    context();
    let own = CudaContext::new_non_primary(0, 0).unwrap();
    simulator.set_max_instructions(1 << 16);
    {
        let spin = ".version 8.0\n.target sm_90\n.address_size 64\n\
                    .visible .entry spin() {\nforever: bra forever;\n}";
        let spin = function(&own, spin, "spin");
        let stream = own.default_stream();
        let timeout = DriverError(CUresult::CUDA_ERROR_LAUNCH_TIMEOUT);
        // SAFETY: the kernel takes nothing and touches nothing.
        let launched = unsafe { stream.launch_builder(&spin).launch(threads(1, 32)) };
        assert_eq!(launched.map(|_| ()).unwrap_err(), timeout);
        let report = simulator.last_fault().unwrap();
        assert!(
            report.contains("`spin`") && report.contains("PTX line 5: bra forever;"),
            "{report}"
        );
        // It sticks.
        assert_eq!(stream.synchronize().unwrap_err(), timeout);
    }
    simulator.set_max_instructions(1 << 38);
}

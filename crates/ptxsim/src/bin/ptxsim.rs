//! `ptxsim`: runs or checks a PTX file from the command line.

use ptxsim::{Checks, DevicePtr, Gpu, Kernel, LaunchConfig, Module, Profile};
use std::process::ExitCode;

const HELP: &str = "\
Runs PTX on the CPU under checks stricter than a GPU's.

  ptxsim check FILE.ptx
      Reads the file and lists its kernels. What it cannot run is an error that names it.

  ptxsim run FILE.ptx --kernel NAME [OPTIONS]
      --grid X[,Y[,Z]]      blocks (1)
      --block X[,Y[,Z]]     threads of a block (1)
      --cluster X[,Y[,Z]]   blocks of a cluster (1)
      --shared BYTES        dynamic shared memory (0)
      --arg VALUE           once per parameter, in order:
                              u32:7 i32:-7 u64:7 i64:-7 f32:0.5 f64:0.5   a number
                              f32[1000]           a buffer that nobody has written
                              f32[1000]=zeros     one of zeros
                              f32[1000]=count     one of 0, 1, 2, ...
                              f32[1000]=FILE      one with the bytes of a file
      --profile NAME        a100, h100 or rtx4090 (h100)
      --seed N              decides the order of blocks and warps (0)
      --no-checks           only what every access has to find out anyway
      --counters            print what the launch did, in numbers

      Prints what the kernel prints, then the first elements of every buffer.

Exit code 0 when all went well, 1 for a fault in the kernel, 2 for anything else.

  ptxsim run add.ptx --kernel add --block 256 --arg f32[256]=count --arg f32[256] --arg i32:256
";

/// Why the program stops.
enum Stop {
    /// The kernel is at fault.
    Fault(String),
    /// The call, or the file, is.
    Usage(String),
}

impl From<String> for Stop {
    fn from(message: String) -> Stop {
        Stop::Usage(message)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["check", file] => check(file),
        ["run", file, options @ ..] => run(file, options),
        ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Fault(text)) => {
            eprintln!("{text}");
            ExitCode::from(1)
        }
        Err(Stop::Usage(text)) => {
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
    }
}

fn load(gpu: &Gpu, file: &str) -> Result<Module, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    gpu.load(&text).map_err(|error| format!("{file}: {error}"))
}

fn check(file: &str) -> Result<(), Stop> {
    let module = load(&Gpu::new(Profile::h100()), file)?;
    for name in module.kernels() {
        if let Some(kernel) = module.kernel(name) {
            println!(
                "{name}: {} parameters, {} bytes of shared memory, about {} registers",
                kernel.params().len(),
                kernel.static_shared_bytes(),
                kernel.registers()
            );
        }
    }
    Ok(())
}

fn run(file: &str, options: &[&str]) -> Result<(), Stop> {
    let mut config = LaunchConfig::default();
    let mut profile = Profile::h100();
    let mut name = None;
    let mut arguments = Vec::new();
    let mut options = options.iter();
    while let Some(&option) = options.next() {
        let mut value = || {
            options
                .next()
                .copied()
                .ok_or_else(|| format!("{option} needs a value"))
        };
        match option {
            "--kernel" => name = Some(value()?),
            "--grid" => config.grid = extents(option, value()?)?,
            "--block" => config.block = extents(option, value()?)?,
            "--cluster" => config.cluster = extents(option, value()?)?,
            "--shared" => config.shared_bytes = number(option, value()?)?,
            "--seed" => config.seed = number(option, value()?)?,
            "--arg" => arguments.push(value()?),
            "--no-checks" => config.checks = Checks::none(),
            "--counters" => config.counters = true,
            "--profile" => {
                let value = value()?;
                let unknown = || format!("{value} is no profile: a100, h100 and rtx4090 are");
                profile = Profile::named(value).ok_or_else(unknown)?;
            }
            _ => return Err(format!("there is no option {option}").into()),
        }
    }

    let gpu = Gpu::new(profile);
    let module = load(&gpu, file)?;
    let names = || module.kernels().collect::<Vec<_>>().join(", ");
    let name = name.ok_or_else(|| format!("name one with --kernel: {}", names()))?;
    let kernel = module.kernel(name);
    let kernel =
        kernel.ok_or_else(|| format!("{file} has no kernel {name}, it has {}", names()))?;
    let (packed, buffers) = pack(&gpu, &kernel, &arguments)?;
    let report = gpu.launch(&kernel, &config, &packed);
    let report = report.map_err(|fault| Stop::Fault(fault.to_string()))?;
    print!("{}", report.printed);
    for buffer in &buffers {
        buffer.print(&gpu)?;
    }
    if let Some(counters) = report.counters {
        println!("{counters:#?}");
    }
    Ok(())
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{what}: {text} is not a number that fits"))
}

fn extents(option: &str, text: &str) -> Result<[u32; 3], String> {
    let mut extents = [1; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 3 {
        return Err(format!("{option}: {text} has more than three extents"));
    }
    for (extent, part) in extents.iter_mut().zip(parts) {
        *extent = number(option, part)?;
    }
    Ok(extents)
}

/// A number type of the command line.
#[derive(Clone, Copy)]
enum Type {
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

impl Type {
    fn named(name: &str) -> Result<Type, String> {
        Ok(match name {
            "u32" => Type::U32,
            "i32" => Type::I32,
            "u64" => Type::U64,
            "i64" => Type::I64,
            "f32" => Type::F32,
            "f64" => Type::F64,
            _ => {
                return Err(format!(
                    "there is no type {name}: u32, i32, u64, i64, f32, f64 are"
                ));
            }
        })
    }

    fn bytes(self) -> usize {
        match self {
            Type::U32 | Type::I32 | Type::F32 => 4,
            Type::U64 | Type::I64 | Type::F64 => 8,
        }
    }

    fn parse(self, text: &str) -> Result<Vec<u8>, String> {
        Ok(match self {
            Type::U32 => number::<u32>("--arg", text)?.to_le_bytes().to_vec(),
            Type::I32 => number::<i32>("--arg", text)?.to_le_bytes().to_vec(),
            Type::U64 => number::<u64>("--arg", text)?.to_le_bytes().to_vec(),
            Type::I64 => number::<i64>("--arg", text)?.to_le_bytes().to_vec(),
            Type::F32 => number::<f32>("--arg", text)?.to_le_bytes().to_vec(),
            Type::F64 => number::<f64>("--arg", text)?.to_le_bytes().to_vec(),
        })
    }

    /// A little-endian element as text.
    fn show(self, bytes: &[u8]) -> String {
        let low = bytes
            .iter()
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        match self {
            Type::U32 | Type::U64 => low.to_string(),
            Type::I32 => (low as i32).to_string(),
            Type::I64 => (low as i64).to_string(),
            Type::F32 => f32::from_bits(low as u32).to_string(),
            Type::F64 => f64::from_bits(low).to_string(),
        }
    }
}

/// A buffer that an argument points to.
struct Buffer {
    argument: String,
    element: Type,
    count: usize,
    address: DevicePtr,
}

impl Buffer {
    /// Makes the buffer that `TYPE[COUNT]` and, after `=`, its content describe.
    fn make(gpu: &Gpu, argument: &str) -> Result<Buffer, String> {
        let (shape, content) = match argument.split_once('=') {
            Some((shape, content)) => (shape, Some(content)),
            None => (argument, None),
        };
        let parts = shape
            .strip_suffix(']')
            .and_then(|shape| shape.split_once('['));
        let (element, count) =
            parts.ok_or_else(|| format!("{argument} is neither TYPE:NUMBER nor TYPE[COUNT]"))?;
        let (element, count) = (Type::named(element)?, number::<usize>("--arg", count)?);
        let size = count.checked_mul(element.bytes());
        let size = size.ok_or_else(|| format!("{argument} is too large"))?;
        let address = gpu
            .alloc(size as u64)
            .map_err(|error| format!("{argument}: {error}"))?;
        let bytes = match content {
            None => None,
            Some("zeros") => Some(vec![0; size]),
            Some("count") => {
                let elements: Result<Vec<_>, _> =
                    (0..count).map(|i| element.parse(&i.to_string())).collect();
                Some(elements?.concat())
            }
            Some(file) => {
                let bytes = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
                if bytes.len() != size {
                    return Err(format!(
                        "{file} has {} bytes, {shape} has {size}",
                        bytes.len()
                    ));
                }
                Some(bytes)
            }
        };
        if let Some(bytes) = bytes {
            gpu.write(address, &bytes)
                .map_err(|error| format!("{argument}: {error}"))?;
        }
        Ok(Buffer {
            argument: argument.to_owned(),
            element,
            count,
            address,
        })
    }

    fn print(&self, gpu: &Gpu) -> Result<(), String> {
        const SHOWN: usize = 8;
        let mut bytes = vec![0; self.count.min(SHOWN) * self.element.bytes()];
        gpu.read(self.address, &mut bytes)
            .map_err(|error| format!("{}: {error}", self.argument))?;
        let elements = bytes
            .chunks(self.element.bytes())
            .map(|bytes| self.element.show(bytes));
        let more = if self.count > SHOWN { ", ..." } else { "" };
        println!(
            "{}: {}{more}",
            self.argument,
            elements.collect::<Vec<_>>().join(", ")
        );
        Ok(())
    }
}

/// The parameters' bytes, and the buffers made for them.
fn pack(gpu: &Gpu, kernel: &Kernel, arguments: &[&str]) -> Result<(Vec<u8>, Vec<Buffer>), String> {
    let params = kernel.params();
    if params.len() != arguments.len() {
        let (wanted, given) = (params.len(), arguments.len());
        return Err(format!(
            "{} takes {wanted} arguments, {given} are given",
            kernel.name()
        ));
    }
    let mut packed = vec![0; kernel.params_size() as usize];
    let mut buffers = Vec::new();
    for (param, &argument) in params.iter().zip(arguments) {
        let bytes = match argument.split_once(':') {
            Some((element, value)) if !argument.contains('[') => {
                Type::named(element)?.parse(value)?
            }
            _ => {
                let buffer = Buffer::make(gpu, argument)?;
                let address = buffer.address.0.to_le_bytes().to_vec();
                buffers.push(buffer);
                address
            }
        };
        if bytes.len() != param.size as usize {
            let (given, wanted) = (bytes.len(), param.size);
            return Err(format!(
                "{argument} has {given} bytes where the kernel takes {wanted}"
            ));
        }
        packed[param.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    Ok((packed, buffers))
}

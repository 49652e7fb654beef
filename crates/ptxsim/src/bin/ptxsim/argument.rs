//! One `--arg`: a kernel's argument as the user writes it.

use ptxsim::{DevicePtr, Gpu};

use crate::number::Number;

/// What a buffer holds before the launch.
enum Content {
    Unwritten,
    /// This element over and over.
    Filled(Vec<u8>),
    Bytes(Vec<u8>),
}

/// Memory that an argument points to.
pub struct Buffer {
    element: Number,
    count: u64,
    content: Content,
}

enum Value {
    /// The parameter's own bytes.
    Immediate(Vec<u8>),
    /// The parameter is the address of this.
    Pointer(Buffer),
}

pub struct Argument {
    pub text: String,
    value: Value,
}

/// A buffer on the device, with the argument that it was made for.
pub struct Placed<'a> {
    text: &'a str,
    buffer: &'a Buffer,
    address: DevicePtr,
}

impl Argument {
    /// Reads the grammar of [`HELP`](crate::options::HELP).
    pub fn parse(text: &str) -> Result<Argument, String> {
        let value = match text.split_once(':') {
            Some((name, rest)) if !name.contains('[') => Value::Immediate(match name {
                "hex" => hex(rest)?,
                name => Number::named(name)?.encode(rest)?,
            }),
            _ => Value::Pointer(Buffer::parse(text)?),
        };
        let text = text.to_string();
        Ok(Argument { text, value })
    }

    /// The parameter's bytes, and the buffer that was made for it.
    pub fn place(&self, gpu: &Gpu) -> Result<(Vec<u8>, Option<Placed<'_>>), String> {
        let buffer = match &self.value {
            Value::Immediate(bytes) => return Ok((bytes.clone(), None)),
            Value::Pointer(buffer) => buffer,
        };
        let address = buffer
            .place(gpu)
            .map_err(|error| format!("{}: {error}", self.text))?;
        let text = &self.text;
        let placed = Placed {
            text,
            buffer,
            address,
        };
        Ok((address.0.to_le_bytes().to_vec(), Some(placed)))
    }
}

impl Buffer {
    /// Reads `TYPE[COUNT]`, and after `=` what is in it.
    fn parse(text: &str) -> Result<Buffer, String> {
        let (shape, content) = match text.split_once('=') {
            Some((shape, content)) => (shape, Some(content)),
            None => (text, None),
        };
        let parts = shape.strip_suffix(']').and_then(|s| s.split_once('['));
        let (element, count) =
            parts.ok_or_else(|| format!("{text} is neither TYPE:NUMBER nor TYPE[COUNT]"))?;
        let element = Number::named(element)?;
        let count: u64 = count
            .parse()
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| format!("{text}: {count} is not a number of elements"))?;
        let size = count.checked_mul(element.bytes as u64);
        let size = size.ok_or_else(|| format!("{text} is too large"))?;
        let content = match content {
            None => Content::Unwritten,
            Some("zeros") => Content::Filled(vec![0; element.bytes]),
            Some("count") => {
                let elements: Result<Vec<_>, _> = (0..count)
                    .map(|index| element.encode(&index.to_string()))
                    .collect();
                Content::Bytes(elements?.concat())
            }
            Some(list) if list.contains(',') || element.encode(list).is_ok() => {
                let elements: Result<Vec<_>, _> =
                    list.split(',').map(|text| element.encode(text)).collect();
                match &elements?[..] {
                    [one] => Content::Filled(one.clone()),
                    elements => Content::Bytes(elements.concat()),
                }
            }
            Some(file) => {
                let read = std::fs::read(file);
                Content::Bytes(read.map_err(|error| format!("{file}: {error}"))?)
            }
        };
        match &content {
            Content::Bytes(bytes) if bytes.len() as u64 != size => Err(format!(
                "{text} gives {} bytes, {shape} has {size}",
                bytes.len()
            )),
            _ => Ok(Buffer {
                element,
                count,
                content,
            }),
        }
    }

    fn place(&self, gpu: &Gpu) -> Result<DevicePtr, ptxsim::MemoryError> {
        let size = self.count * self.element.bytes as u64;
        let address = gpu.alloc(size)?;
        match &self.content {
            Content::Unwritten => {}
            Content::Filled(one) => gpu.write(address, &one.repeat(self.count as usize))?,
            Content::Bytes(bytes) => gpu.write(address, bytes)?,
        }
        Ok(address)
    }
}

impl Placed<'_> {
    /// The buffer's first `elements` elements in one line.
    pub fn show(&self, gpu: &Gpu, elements: u64) -> Result<String, String> {
        let Buffer { element, count, .. } = self.buffer;
        let mut bytes = vec![0; (elements.min(*count) * element.bytes as u64) as usize];
        gpu.read(self.address, &mut bytes)
            .map_err(|error| format!("{}: {error}", self.text))?;
        let mut shown: Vec<String> = bytes
            .chunks_exact(element.bytes)
            .map(|bytes| element.decode(bytes))
            .collect();
        if *count > elements {
            shown.push("...".to_string());
        }
        Ok(format!("{}: {}\n", self.text, shown.join(", ")))
    }
}

fn hex(text: &str) -> Result<Vec<u8>, String> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|digit| digit.to_digit(16).map(|digit| digit as u8))
        .collect();
    match digits {
        Some(digits) if digits.len() % 2 == 0 => Ok(digits
            .chunks_exact(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()),
        _ => Err(format!(
            "hex:{text} is not made of pairs of hexadecimal digits"
        )),
    }
}

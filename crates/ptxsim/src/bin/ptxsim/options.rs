//! The command line.

use std::ffi::OsString;

use ptxsim::{Checks, LaunchConfig, Profile};

use crate::argument::Argument;

pub const HELP: &str = "\
Runs PTX on the CPU under checks stricter than a GPU's.

  ptxsim check FILE.ptx... [--profile NAME]
      Reads the files and lists their kernels, or points at what cannot be read.

  ptxsim run FILE.ptx --kernel NAME [OPTIONS]
      --grid X[,Y[,Z]]      blocks (1)
      --block X[,Y[,Z]]     threads of a block (1)
      --cluster X[,Y[,Z]]   blocks of a cluster (1)
      --shared BYTES        dynamic shared memory (0)
      --arg VALUE           once per parameter, in order:
                              i32:-7  f32:0.5       a number
                              hex:0000803f05000000  the bytes of a struct
                              f32[1000]             a buffer that nobody has written
                              f32[1000]=zeros       one of zeros
                              f32[1000]=count       one of 0, 1, 2, ...
                              f32[1000]=0.5         one of this number throughout
                              f32[3]=1,2.5,-3       one of these numbers
                              f32[1000]=FILE        one with the bytes of a file
                            types: i8 i16 i32 i64 u8 u16 u32 u64 f16 bf16 f32 f64
      --show N              elements to print of each buffer (8)
      --profile NAME        the GPU to be: a100, h100 or rtx4090 (h100)
      --seed N              decides the order of blocks and warps (0)
      --no-checks           only what every access has to find out anyway
      --counters            print what the launch did, in numbers
      --max-instructions N  end a kernel that runs more warp instructions

      Prints what the kernel prints, then the first elements of every buffer.

Exit code 0 when all went well, 1 for PTX that cannot be read or a kernel at fault, 2 for a
mistake in the call.

  ptxsim run add.ptx --kernel add --block 256 --arg f32[256]=count --arg f32[256] --arg i32:256
";

pub enum Command {
    Help,
    Check {
        files: Vec<String>,
        profile: Profile,
    },
    Run(Box<Run>),
}

pub struct Run {
    pub file: String,
    /// `None` where the user named none.
    pub kernel: Option<String>,
    pub profile: Profile,
    pub config: LaunchConfig,
    pub arguments: Vec<Argument>,
    /// Elements to print of each buffer.
    pub show: u64,
}

impl Command {
    /// Reads the command line behind the program's name. The error is a sentence for the user.
    pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Command, String> {
        let words: Result<Vec<String>, OsString> = words.map(OsString::into_string).collect();
        let words = words.map_err(|word| format!("{} is not UTF-8", word.display()))?;
        let wants_help = |word: &String| matches!(&word[..], "--help" | "-h" | "help");
        match words.split_first() {
            None => Err("say what to do, run or check; see ptxsim --help".to_string()),
            Some(_) if words.iter().any(wants_help) => Ok(Command::Help),
            Some((word, rest)) if word == "run" => Run::parse(rest),
            Some((word, rest)) if word == "check" => check(rest),
            Some((word, _)) => Err(format!(
                "{word} is not a command, run and check are; see ptxsim --help"
            )),
        }
    }
}

fn check(words: &[String]) -> Result<Command, String> {
    let mut files = Vec::new();
    let mut profile = Profile::h100();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match &word[..] {
            "--profile" => profile = profile_named(value(word, words.next())?)?,
            option if option.starts_with('-') => return Err(unknown(option)),
            file => files.push(file.to_string()),
        }
    }
    if files.is_empty() {
        return Err("name the PTX file to check".to_string());
    }
    Ok(Command::Check { files, profile })
}

impl Run {
    fn parse(words: &[String]) -> Result<Command, String> {
        let (mut file, mut kernel) = (None, None);
        let mut profile = Profile::h100();
        let mut config = LaunchConfig::default();
        let mut arguments = Vec::new();
        let mut show = 8;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut next = || value(word, words.next());
            match &word[..] {
                "--kernel" => kernel = Some(next()?.to_string()),
                "--grid" => config.grid = dimensions(word, next()?)?,
                "--block" => config.block = dimensions(word, next()?)?,
                "--cluster" => config.cluster = dimensions(word, next()?)?,
                "--shared" => config.shared_bytes = count(word, next()?)?,
                "--seed" => config.seed = count(word, next()?)?,
                "--max-instructions" => config.max_instructions = Some(count(word, next()?)?),
                "--show" => show = count(word, next()?)?,
                "--profile" => profile = profile_named(next()?)?,
                "--no-checks" => config.checks = Checks::none(),
                "--counters" => config.counters = true,
                "--arg" => arguments.push(Argument::parse(next()?)?),
                option if option.starts_with('-') => return Err(unknown(option)),
                path => {
                    if let Some(first) = file.replace(path.to_string()) {
                        return Err(format!("one PTX file at a time, not {first} and {path}"));
                    }
                }
            }
        }
        Ok(Command::Run(Box::new(Run {
            file: file.ok_or("name the PTX file to run")?,
            kernel,
            profile,
            config,
            arguments,
            show,
        })))
    }
}

fn unknown(option: &str) -> String {
    format!("there is no option {option}; see ptxsim --help")
}

fn value<'a>(option: &str, word: Option<&'a String>) -> Result<&'a str, String> {
    let word = word.ok_or_else(|| format!("{option} needs a value; see ptxsim --help"))?;
    Ok(word)
}

fn profile_named(name: &str) -> Result<Profile, String> {
    Profile::named(name)
        .ok_or_else(|| format!("there is no profile {name}: a100, h100 and rtx4090 are"))
}

fn count<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{option} {text}: a whole number is needed"))
}

/// `x`, `x,y` or `x,y,z`.
fn dimensions(option: &str, text: &str) -> Result<[u32; 3], String> {
    let mut out = [1; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 3 {
        return Err(format!(
            "{option} {text}: there are at most three dimensions"
        ));
    }
    for (to, part) in out.iter_mut().zip(parts) {
        *to = count(option, part)?;
    }
    Ok(out)
}

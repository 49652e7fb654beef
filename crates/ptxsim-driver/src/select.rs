//! Opens the simulated driver in this process, and talks to it.

use crate::api::{Visitor, bits_of};
use ptxsim::{Checks, Counters};
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

/// This build of the crate.
pub(crate) const VERSION: [u32; 3] = [
    number(env!("CARGO_PKG_VERSION_MAJOR")),
    number(env!("CARGO_PKG_VERSION_MINOR")),
    number(env!("CARGO_PKG_VERSION_PATCH")),
];

const fn number(digits: &str) -> u32 {
    match u32::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => 0,
    }
}

/// Why the simulated driver was not selected.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// Only Linux's loader works as needed.
    #[error("the simulated driver needs Linux")]
    Platform,
    /// The library is in none of the places where it should be.
    #[error("the simulated driver {LIBRARY} was not found; looked for {}", list(.0))]
    NotFound(Vec<PathBuf>),
    /// The loader refused the library.
    #[error("the simulated driver could not be opened: {0}")]
    Open(#[from] libloading::Error),
    /// A process has one driver, and this one has a real one.
    #[error(
        "a real CUDA driver is already loaded in this process: select the simulator before it is used"
    )]
    RealDriver,
    /// The library was built from another version of this crate.
    #[error("the simulated driver at {} is version {found:?}, and this program needs {VERSION:?}", path.display())]
    Version {
        /// Where it lies.
        path: PathBuf,
        /// Its version.
        found: [u32; 3],
    },
    /// There is no such profile.
    #[error("`{0}` is not a simulated device: a100, h100 and rtx4090 are")]
    Profile(String),
    /// The device exists already, with another profile.
    #[error("the simulated device was already made with another profile than `{0}`")]
    AlreadyMade(String),
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

const LIBRARY: &str = "libptxsim_driver.so";

/// The simulated driver of this process, once selected.
#[derive(Debug, Clone, Copy)]
pub struct Simulator {
    select_profile: extern "C" fn(*const c_char) -> u32,
    set_launch: extern "C" fn(u64, u32, bool) -> u32,
    set_max_instructions: extern "C" fn(u64) -> u32,
    last_fault: extern "C" fn(*mut u8, usize) -> usize,
    take_launches: extern "C" fn(Visitor, *mut c_void),
}

/// What a launch counted.
#[derive(Debug, Clone)]
pub struct CountedLaunch {
    /// The kernel's name.
    pub kernel: String,
    /// Its totals.
    pub counters: Counters,
}

/// Makes the simulated driver this process's CUDA driver, with a device of the profile `a100`,
/// `h100` or `rtx4090`. Call it before anything uses CUDA; calling it again is harmless.
pub fn select(profile: &str) -> Result<Simulator, SelectError> {
    static OPENED: OnceLock<Simulator> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());
    let guard = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    let simulator = match OPENED.get() {
        Some(simulator) => *simulator,
        None => {
            let opened = open()?;
            *OPENED.get_or_init(|| opened)
        }
    };
    drop(guard);

    let unknown = || SelectError::Profile(profile.to_owned());
    let name = CString::new(profile).map_err(|_| unknown())?;
    match (simulator.select_profile)(name.as_ptr()) {
        0 => Ok(simulator),
        500 => Err(unknown()),
        _ => Err(SelectError::AlreadyMade(profile.to_owned())),
    }
}

#[cfg(not(target_os = "linux"))]
fn open() -> Result<Simulator, SelectError> {
    Err(SelectError::Platform)
}

#[cfg(target_os = "linux")]
fn open() -> Result<Simulator, SelectError> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    /// Only answer with what is loaded already.
    const RTLD_NOLOAD: i32 = 4;

    for name in ["libcuda.so.1", "libcuda.so"] {
        // SAFETY: nothing is loaded, so no code runs.
        let loaded = unsafe { Library::open(Some(name), RTLD_NOLOAD | RTLD_NOW) };
        if loaded.is_ok() {
            return Err(SelectError::RealDriver);
        }
    }

    let path = find()?;
    // SAFETY: the library is this crate, whose loading runs no code of its own.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }?;
    let mut found = [0; 3];
    // SAFETY: the symbols' types are those in `api::control`, of the same version; the function
    // that tells the version keeps its type in all of them.
    let simulator = unsafe {
        let version: extern "C" fn(*mut [u32; 3]) -> u32 = *library.get(b"ptxsimVersion")?;
        version(&mut found);
        if found != VERSION {
            return Err(SelectError::Version { path, found });
        }
        Simulator {
            select_profile: *library.get(b"ptxsimSelectProfile")?,
            set_launch: *library.get(b"ptxsimSetLaunch")?,
            set_max_instructions: *library.get(b"ptxsimSetMaxInstructions")?,
            last_fault: *library.get(b"ptxsimLastFault")?,
            take_launches: *library.get(b"ptxsimTakeLaunches")?,
        }
    };
    // It stays for the life of the process: it is the process's driver.
    std::mem::forget(library);
    Ok(simulator)
}

/// The path of the library.
#[cfg(target_os = "linux")]
fn find() -> Result<PathBuf, SelectError> {
    if let Some(path) = std::env::var_os("PTXSIM_DRIVER") {
        return Ok(path.into());
    }
    let program = std::env::current_exe().unwrap_or_default();
    let beside = program.parent().map(PathBuf::from).unwrap_or_default();
    let places = vec![beside.join(LIBRARY), beside.join("deps").join(LIBRARY)];
    // Cargo puts it into both when it builds the crate itself, and only into the second when it builds another that
    // depends on it: the first is then of an earlier build.
    let built = |place: &&PathBuf| place.metadata().and_then(|file| file.modified()).ok();
    match places
        .iter()
        .filter(|place| place.is_file())
        .max_by_key(built)
    {
        Some(place) => Ok(place.clone()),
        None => Err(SelectError::NotFound(places)),
    }
}

impl Simulator {
    /// How later launches run: the seed decides the order of blocks and warps, and the counters of
    /// each launch are kept for [`Simulator::take_launches`] when asked for.
    pub fn set_launch(&self, seed: u64, checks: Checks, counters: bool) {
        (self.set_launch)(seed, bits_of(checks), counters);
    }

    /// The watchdog of later launches: one that runs more warp instructions ends with
    /// `CUDA_ERROR_LAUNCH_TIMEOUT`. Before it is set, 2^38: some hours.
    pub fn set_max_instructions(&self, limit: u64) {
        (self.set_max_instructions)(limit);
    }

    /// The full report of the last fault, refused launch or refused PTX, if there was any.
    pub fn last_fault(&self) -> Option<String> {
        let mut text = vec![0; (self.last_fault)(std::ptr::null_mut(), 0)];
        let length = (self.last_fault)(text.as_mut_ptr(), text.len());
        text.truncate(length);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    /// The launches that were counted since the last call, in order.
    pub fn take_launches(&self) -> Vec<CountedLaunch> {
        extern "C" fn push(
            launches: *mut c_void,
            name: *const u8,
            length: usize,
            counters: *const Counters,
        ) {
            // SAFETY: the library calls this during the call below, with the vector given there, a
            // name of that many bytes and counters of the same build.
            unsafe {
                let launches = &mut *launches.cast::<Vec<CountedLaunch>>();
                let name = std::slice::from_raw_parts(name, length);
                let kernel = String::from_utf8_lossy(name).into_owned();
                launches.push(CountedLaunch {
                    kernel,
                    counters: *counters,
                });
            }
        }
        let mut launches: Vec<CountedLaunch> = Vec::new();
        (self.take_launches)(push, (&raw mut launches).cast());
        launches
    }
}

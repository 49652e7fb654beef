//! What the driver remembers: the device, contexts, and everything that a handle stands for.

use crate::capture::{Captures, Mark};
use crate::error::CuResult;
use ptxsim::{Checks, Counters, DevicePtr, Gpu, Kernel, MemoryError, Module, Profile};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// A handle as callers hold it: an opaque pointer that only tables give meaning to.
pub type Handle = usize;

/// Locks; a panic elsewhere leaves nothing here half-changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the simulator is to behave. Outside of the driver API.
pub struct Settings {
    pub profile: Profile,
    /// The CUDA version whose driver this one is, as `cuDriverGetVersion` writes it: 13000 is 13.0.
    pub driver_version: i32,
    pub seed: u64,
    pub checks: Checks,
    pub counters: bool,
    /// Warp instructions after which a launch counts as endless.
    pub max_instructions: u64,
}

/// Of the compiler that the kernels are made with.
const DRIVER_VERSION: i32 = 13000;

/// Some hours of simulation.
const MAX_INSTRUCTIONS: u64 = 1 << 38;

/// What a launch counted.
pub struct LaunchRecord {
    pub kernel: String,
    pub counters: Counters,
}

pub static SETTINGS: Mutex<Option<Settings>> = Mutex::new(None);
static DRIVER: OnceLock<Driver> = OnceLock::new();
/// The text of the last fault or load error.
pub static LAST_FAULT: Mutex<Option<String>> = Mutex::new(None);
pub static LAUNCHES: Mutex<Vec<LaunchRecord>> = Mutex::new(Vec::new());

/// The settings, from the environment where nobody has made any.
pub fn settings<T>(use_them: impl FnOnce(&mut Settings) -> T) -> T {
    let mut settings = lock(&SETTINGS);
    let settings = settings.get_or_insert_with(|| {
        let named = std::env::var("PTXSIM_PROFILE").ok();
        let version = std::env::var("PTXSIM_DRIVER_VERSION").ok();
        Settings {
            profile: named
                .and_then(|name| Profile::named(&name))
                .unwrap_or_else(Profile::a100),
            driver_version: version
                .and_then(|version| version.parse().ok())
                .unwrap_or(DRIVER_VERSION),
            seed: 0,
            checks: Checks::all(),
            counters: false,
            max_instructions: MAX_INSTRUCTIONS,
        }
    });
    use_them(settings)
}

/// Keeps the text of what went wrong, and shows it: a result code says so little.
pub fn report(text: String) {
    eprintln!("ptxsim: {text}");
    *lock(&LAST_FAULT) = Some(text);
}

/// Handles of one kind and what they stand for.
pub struct Table<T>(Mutex<HashMap<Handle, Arc<T>>>);

impl<T> Table<T> {
    pub fn new() -> Table<T> {
        Table(Mutex::new(HashMap::new()))
    }

    /// A new handle, unlike any other of any kind, past or present.
    pub fn insert(&self, object: T) -> Handle {
        // Far from the small numbers that stand for default streams, and 16 apart like pointers.
        static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        lock(&self.0).insert(handle, Arc::new(object));
        handle
    }

    pub fn get(&self, handle: Handle) -> Result<Arc<T>, CuResult> {
        let found = lock(&self.0).get(&handle).cloned();
        found.ok_or(CuResult::ERROR_INVALID_HANDLE)
    }

    pub fn remove(&self, handle: Handle) -> Result<Arc<T>, CuResult> {
        let removed = lock(&self.0).remove(&handle);
        removed.ok_or(CuResult::ERROR_INVALID_HANDLE)
    }

    pub fn retain(&self, keep: impl Fn(&T) -> bool) {
        lock(&self.0).retain(|_, object| keep(object));
    }
}

/// The driver after `cuInit`.
pub struct Driver {
    pub gpu: Gpu,
    pub contexts: Table<Context>,
    /// The primary context's handle and how often it is retained.
    pub primary: Mutex<Option<(Handle, u32)>>,
    pub streams: Table<Stream>,
    pub captures: Captures,
    pub events: Table<Event>,
    pub modules: Table<LoadedModule>,
    pub functions: Table<Function>,
    /// Pinned host memory: bytes by address, and whether the driver allocated it.
    pub host: Mutex<BTreeMap<u64, (usize, bool)>>,
}

/// A context owns what was created in it, and dies of a fault.
pub struct Context {
    pub flags: u32,
    /// Bytes by address.
    pub allocations: Mutex<BTreeMap<u64, u64>>,
    /// What ended it: every later call answers with it.
    pub fault: Mutex<Option<CuResult>>,
}

pub struct Stream {
    pub context: Handle,
    pub flags: u32,
    pub priority: i32,
}

pub struct Event {
    pub context: Handle,
    pub timed: bool,
    pub recorded: Mutex<Option<Instant>>,
    /// Where it stands in a capture, if it was last recorded in one.
    pub captured: Mutex<Option<Mark>>,
}

pub struct LoadedModule {
    pub context: Handle,
    pub module: Module,
    /// The functions handed out, by name.
    pub functions: Mutex<HashMap<String, Handle>>,
}

pub struct Function {
    pub module: Handle,
    pub context: Handle,
    pub kernel: Kernel,
    /// The name as C callers get it.
    pub name: std::ffi::CString,
    pub max_dynamic_shared: AtomicI32,
}

thread_local! {
    /// The stack of contexts that are current to the thread.
    pub static CURRENT: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// `cuInit`: makes the device.
pub fn initialize() {
    DRIVER.get_or_init(|| Driver {
        gpu: Gpu::new(settings(|settings| settings.profile.clone())),
        contexts: Table::new(),
        primary: Mutex::new(None),
        streams: Table::new(),
        captures: Captures::new(),
        events: Table::new(),
        modules: Table::new(),
        functions: Table::new(),
        host: Mutex::new(BTreeMap::new()),
    });
}

/// The driver, if `cuInit` was called.
pub fn driver() -> Result<&'static Driver, CuResult> {
    DRIVER.get().ok_or(CuResult::ERROR_NOT_INITIALIZED)
}

impl Driver {
    /// The current context's handle and the context, if it is alive and well.
    pub fn current(&self) -> Result<(Handle, Arc<Context>), CuResult> {
        let top = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0));
        if top == 0 {
            return Err(CuResult::ERROR_INVALID_CONTEXT);
        }
        let context = self.contexts.get(top);
        let context = context.map_err(|_| CuResult::ERROR_CONTEXT_IS_DESTROYED)?;
        match *lock(&context.fault) {
            Some(code) => Err(code),
            None => Ok((top, context.clone())),
        }
    }

    pub fn create_context(&self, flags: u32) -> Handle {
        self.contexts.insert(Context {
            flags,
            allocations: Mutex::default(),
            fault: Mutex::new(None),
        })
    }

    /// Frees everything that was made in the context, its fault included.
    pub fn destroy_context(&self, handle: Handle) -> Result<(), CuResult> {
        let removed = self.contexts.remove(handle);
        let context = removed.map_err(|_| CuResult::ERROR_INVALID_CONTEXT)?;
        self.streams.retain(|stream| stream.context != handle);
        self.captures.graphs.retain(|graph| graph.context != handle);
        self.captures
            .executables
            .retain(|graph| graph.context != handle);
        self.events.retain(|event| event.context != handle);
        self.functions.retain(|function| function.context != handle);
        self.modules.retain(|module| module.context != handle);
        let addresses = lock(&context.allocations);
        addresses
            .keys()
            .try_for_each(|&address| Ok(self.gpu.free(DevicePtr(address))?))
    }

    /// Whether an address is the device's rather than the host's.
    pub fn is_device(&self, address: u64) -> bool {
        let probe = self.gpu.read(DevicePtr(address), &mut []);
        !matches!(probe, Err(MemoryError::NotDevice(_)))
    }

    /// Checks a stream's handle. 0, 1 and 2 are the default streams.
    pub fn check_stream(&self, stream: Handle) -> Result<(), CuResult> {
        if stream <= 2 {
            Ok(())
        } else {
            self.streams.get(stream).map(|_| ())
        }
    }
}

/// The body of an API function: its error becomes the result, and a panic does not cross into C.
pub fn call(body: impl FnOnce() -> Result<(), CuResult>) -> CuResult {
    match std::panic::catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => CuResult::SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => CuResult::ERROR_UNKNOWN,
    }
}

/// The body of an API function that needs `cuInit`.
pub fn with_driver(body: impl FnOnce(&'static Driver) -> Result<(), CuResult>) -> CuResult {
    call(|| body(driver()?))
}

/// The body of an API function that needs a current context without a fault.
pub fn in_context(
    body: impl FnOnce(&'static Driver, Handle, &Context) -> Result<(), CuResult>,
) -> CuResult {
    call(|| {
        let driver = driver()?;
        let (handle, context) = driver.current()?;
        body(driver, handle, &context)
    })
}

//! The kernels on the CPU, for tests: CUDA's and Metal's each compiled as C++ by the machine's compiler with a stand-in
//! for what the GPU's compiler brings (`cuda/host`, `metal/host`), loaded, and run with the launcher's own grid and
//! arguments.
//!
//! Every launch runs twice, with the threads in opposite orders: a result that depends on the order is a race. Buffers
//! have margins that no kernel may touch, and memory that nobody wrote holds NaN.

use std::{
    cell::Cell,
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
    process::Command,
    sync::{Mutex, OnceLock},
};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    KERNELS, MATRIX_KERNELS,
    launch::{Launch, THREADS},
};
use crate::kernels::{cuda, metal};

/// Whose kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Cuda,
    Metal,
}

thread_local! {
    /// Whose kernels this thread's launches on the CPU run.
    static LANGUAGE: Cell<Language> =
        const { Cell::new(if cfg!(feature = "metal") { Language::Metal } else { Language::Cuda }) };
}

/// `launch` of `host/launch.hpp`.
type Entry = unsafe extern "C" fn(*const c_char, *const u32, u32, *mut *mut c_void, c_int) -> *const c_char;

/// Words around a buffer.
const MARGIN: usize = 64;
/// What they hold: a NaN of its own.
const UNTOUCHED: u32 = 0x7fc1_2345;

/// Calls `check` with the tensors on every device that has the kernels: here, once with CUDA's and once with Metal's,
/// and on the GPU that the build is for. Without a C++ compiler it says so, and fails where nothing may be skipped.
pub fn on<const N: usize>(tensors: [&Tensor; N], check: impl Fn([&Tensor; N]) -> Result<()>) -> Result<()> {
    if entry(Language::Cuda).is_some() {
        for language in [Language::Cuda, Language::Metal] {
            LANGUAGE.set(language);
            check(tensors)?;
        }
    } else if std::env::var_os("DPO_LORA_REQUIRE_ALL").is_some() {
        bail!("no C++ compiler for the kernels");
    } else {
        eprintln!("skipped: no C++ compiler for the kernels");
    }
    #[cfg(any(feature = "cuda", feature = "metal"))]
    {
        // whose kernels the device has
        LANGUAGE.set(if cfg!(feature = "cuda") { Language::Cuda } else { Language::Metal });
        #[cfg(feature = "cuda")]
        let device = crate::kernels::cuda::device::open(0)?;
        #[cfg(not(feature = "cuda"))]
        let device = Device::new_metal(0)?;
        let there: Vec<Tensor> = tensors.iter().map(|tensor| tensor.to_device(&device)).collect::<Result<_>>()?;
        check(std::array::from_fn(|i| &there[i]))?;
    }
    Ok(())
}

/// Whether the kernels that `on` runs just now are CUDA's, which know bf16.
pub fn knows_bf16() -> bool {
    LANGUAGE.get() == Language::Cuda
}

/// An argument of a kernel: a tensor's bits between margins.
struct Argument(Vec<u32>);

impl Argument {
    fn of(words: &[u32]) -> Self {
        let margin = [UNTOUCHED; MARGIN];
        Self([&margin, words, &margin].concat())
    }

    fn words(&self) -> &[u32] {
        &self.0[MARGIN..self.0.len() - MARGIN]
    }

    fn is_whole(&self) -> bool {
        let (first, last) = (&self.0[..MARGIN], &self.0[self.0.len() - MARGIN..]);
        first.iter().chain(last).all(|word| *word == UNTOUCHED)
    }
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect(),
        DType::U32 => flat.to_vec1()?,
        DType::U8 => {
            let mut bytes = flat.to_vec1::<u8>()?;
            bytes.resize(bytes.len().next_multiple_of(4), 0xff);
            bytes.chunks(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
        }
        DType::BF16 => {
            let numbers = flat.to_vec1::<half::bf16>()?;
            let half = |number: Option<&half::bf16>| u32::from(number.map_or(0xffff, |number| number.to_bits()));
            numbers.chunks(2).map(|pair| half(pair.first()) | half(pair.get(1)) << 16).collect()
        }
        other => bail!("a kernel takes no {other:?}"),
    })
}

/// See [`super::launch::run`].
pub fn run(launch: &Launch, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    let language = LANGUAGE.get();
    let Some((entry, turn)) = entry(language) else { bail!("no C++ compiler for the kernels") };
    let (name, groups) = (CString::new(launch.kernel).expect("a name"), launch.groups.map(|n| n as u32));
    let mut results = Vec::new();
    for descending in [0, 1] {
        let mut arguments: Vec<Argument> = Vec::new();
        for tensor in inputs.iter().chain(outputs) {
            arguments.push(Argument::of(&bits(tensor)?));
        }
        arguments.push(Argument::of(launch.words));
        let mut pointers: Vec<*mut c_void> =
            arguments.iter_mut().map(|argument| argument.0[MARGIN..].as_mut_ptr().cast()).collect();
        // a failed check in another test does not matter to this one
        let _turn = turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the library was compiled from this crate's sources and has this signature; the buffers outlive the
        // call and their number is that of the kernel's arguments, or nothing here could be right; `_turn` keeps others
        // out, as the fibers are the library's only ones.
        let trouble = unsafe {
            let trouble = entry(name.as_ptr(), groups.as_ptr(), THREADS as u32, pointers.as_mut_ptr(), descending);
            (!trouble.is_null()).then(|| CStr::from_ptr(trouble).to_string_lossy())
        };
        if let Some(trouble) = trouble {
            bail!("{} of {language:?}: {trouble}", launch.kernel);
        }
        for (i, argument) in arguments.iter().enumerate() {
            assert!(argument.is_whole(), "{} writes beyond argument {i}", launch.kernel);
        }
        for (i, (argument, input)) in arguments.iter().zip(inputs).enumerate() {
            assert!(argument.words() == bits(input)?, "{} writes input {i}", launch.kernel);
        }
        results.push(arguments.split_off(inputs.len()));
    }
    for (i, output) in outputs.iter().enumerate() {
        let words = results[0][i].words();
        assert!(words == results[1][i].words(), "{}: output {i} depends on the threads' order", launch.kernel);
        let result = if output.dtype() == DType::BF16 {
            let halves = words.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]).map(half::bf16::from_bits);
            Tensor::from_vec(halves.take(output.elem_count()).collect(), output.shape(), &Device::Cpu)?
        } else {
            let floats: Vec<f32> = words.iter().map(|word| f32::from_bits(*word)).collect();
            Tensor::from_vec(floats, output.shape(), &Device::Cpu)?
        };
        output.slice_set(&result, 0, 0)?;
    }
    Ok(())
}

/// A library's entry and whose turn it is; none without a compiler.
fn entry(language: Language) -> Option<(Entry, &'static Mutex<()>)> {
    static TURNS: [Mutex<()>; 2] = [const { Mutex::new(()) }; 2];
    static ENTRIES: [OnceLock<Option<Entry>>; 2] = [const { OnceLock::new() }; 2];
    let i = language as usize;
    ENTRIES[i].get_or_init(|| build(language)).map(|entry| (entry, &TURNS[i]))
}

fn kernels(language: Language) -> Vec<&'static str> {
    match language {
        Language::Cuda => [&KERNELS[..], &MATRIX_KERNELS].concat(),
        Language::Metal => KERNELS.to_vec(),
    }
}

fn sources(language: Language) -> String {
    match language {
        Language::Cuda => ["#include \"cuda.hpp\"\n", &cuda::SOURCES.concat()].concat(),
        Language::Metal => metal::SOURCES.concat(),
    }
}

fn build(language: Language) -> Option<Entry> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    Command::new(&compiler).arg("--version").output().ok()?;
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("a file");
    write("cuda.hpp", include_str!("../cuda/host/cuda.hpp"));
    write("metal_stdlib", include_str!("../metal/host/metal_stdlib"));
    write("fibers.hpp", include_str!("host/fibers.hpp"));
    let names: Vec<String> = kernels(language).iter().map(|kernel| format!("NAME({kernel})")).collect();
    let names = format!("\n#define NAMES {}\n", names.join(" "));
    let launch = match language {
        Language::Cuda => include_str!("../cuda/host/launch.hpp"),
        Language::Metal => include_str!("../metal/host/launch.hpp"),
    };
    write("kernels.cpp", &[&*sources(language), &*names, launch].concat());
    let library = folder.path().join("kernels.so");
    let output = Command::new(&compiler)
        .args(["-std=c++14", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"])
        .args(["-Wall", "-Wextra", "-Werror"])
        // what a GPU's compiler alone reads, and arguments that every kernel has
        .args(["-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-unused-parameter"])
        .args(["-Wno-unused-variable", "-Wno-unused-function"])
        .arg("-I")
        .arg(folder.path())
        .arg(folder.path().join("kernels.cpp"))
        .arg("-o")
        .arg(&library)
        .output()
        .expect("the compiler runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(load(&library))
}

fn load(library: &Path) -> Entry {
    let path = CString::new(library.to_str().expect("a path in UTF-8")).expect("a path");
    // SAFETY: the library's constructors make empty vectors; it is never closed, so the entry stays; the symbol has
    // this signature.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{}: {}", library.display(), CStr::from_ptr(libc::dlerror()).to_string_lossy());
        let entry = libc::dlsym(handle, c"launch".as_ptr());
        assert!(!entry.is_null());
        std::mem::transmute::<*mut c_void, Entry>(entry)
    }
}

#[test]
fn every_kernel_is_listed() {
    for language in [Language::Cuda, Language::Metal] {
        is_listed(language);
    }
}

fn is_listed(language: Language) {
    let text = sources(language);
    let plain = text.split("\nKERNEL ").skip(1).map(|rest| rest.split('(').next().unwrap_or_default().to_string());
    let made = text.split("\nATTENTION").skip(1).flat_map(|rest| {
        let mut words = rest.split(['(', ',']);
        let (which, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match which {
            "_BACKWARD" => vec![format!("attention_dq_{name}"), format!("attention_dkv_{name}")],
            "_BF16" => ["", "dq_", "dkv_"].map(|part| format!("attention_{part}bf16_{name}")).to_vec(),
            _ => vec![name.to_string()],
        }
    });
    let mut found: Vec<String> = plain.chain(made).collect();
    let mut listed: Vec<String> = kernels(language).into_iter().map(String::from).collect();
    found.sort();
    listed.sort();
    assert_eq!(found, listed, "{language:?}");
}

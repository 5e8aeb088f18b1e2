//! The arrows of docs/architecture.md: which folder of `src` may use which, read off the `use crate::` lines.

use std::{fs, path::Path};

/// A folder (or file) of `src`, and what it may use besides `error`, `random` and itself.
const MAY_USE: [(&str, &[&str]); 21] = [
    ("main", &["cli", "confined", "heap"]),
    (
        "cli",
        &[
            "data",
            "engine",
            "export",
            "hub",
            "model",
            "objective",
            "outside",
            "recipe",
            "report",
            "store",
            "train",
            "weights",
        ],
    ),
    (
        "train",
        &[
            "data",
            "engine",
            "export",
            "heap",
            "hub",
            "kernels",
            "model",
            "objective",
            "optim",
            "outside",
            "recipe",
            "report",
            "sha256",
            "store",
            "weights",
        ],
    ),
    ("export", &["data", "keys", "model", "outside", "recipe", "store", "weights"]),
    ("engine", &["kernels", "model", "objective"]),
    ("objective", &["data", "kernels", "model", "recipe", "store"]),
    ("optim", &["kernels", "recipe", "weights"]),
    ("model", &["kernels", "keys", "weights"]),
    ("weights", &["kernels", "keys", "outside", "sha256", "store"]),
    ("kernels", &[]),
    ("data", &["confined", "heap", "outside", "recipe", "weights"]),
    ("recipe", &[]),
    ("hub", &["outside", "sha256"]),
    ("report", &["store"]),
    ("store", &["outside", "sha256"]),
    ("heap", &[]),
    ("keys", &["outside"]),
    ("outside", &[]),
    ("confined", &[]),
    ("random", &[]),
    ("sha256", &[]),
];

fn rust_files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The rooms that a file names as `crate::ROOM`, outside of its tests.
fn used(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = lines.join("\n");
    let mut rooms = Vec::new();
    for rest in code.split("crate::").skip(1) {
        // `crate::{a::…, b::…}`: the names at the first level of the braces
        let mut depth = 0;
        let mut name = String::new();
        let mut names = Vec::new();
        let braced = rest.starts_with('{');
        for c in rest.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 && braced => names.push(std::mem::take(&mut name)),
                c if depth == usize::from(braced) as i32 => name.push(c),
                _ => {}
            }
            let ended = if braced { depth == 0 } else { !(c.is_alphanumeric() || c == '_') };
            if ended {
                break;
            }
        }
        names.push(name);
        let first =
            |name: &String| name.trim().split("::").next().unwrap_or_default().trim_end_matches(':').to_string();
        rooms.extend(names.iter().map(first));
    }
    rooms
}

#[test]
fn folders_use_only_what_they_may() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    assert!(files.len() > 50, "the sources are there");
    for file in files {
        let relative = file.strip_prefix(&source).unwrap();
        let room = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if ["lib", "error"].contains(&room) || file.to_str().unwrap().ends_with("tests.rs") {
            continue;
        }
        let (_, allowed) =
            MAY_USE.iter().find(|(name, _)| *name == room).unwrap_or_else(|| panic!("{room} is not in the table"));
        for used in used(&fs::read_to_string(&file).unwrap()) {
            let known = MAY_USE.iter().any(|(name, _)| *name == used);
            assert!(
                !known || used == room || used == "random" || allowed.contains(&used.as_str()),
                "{}: {room} may not use {used}",
                relative.display()
            );
        }
    }
}

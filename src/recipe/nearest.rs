//! What a person probably meant: the nearest name, the section where a key belongs.

use super::schema::{KEYS, Key, SECTIONS};

/// Names less alike than this (1: equal) are not offered: a wrong guess misleads more than none.
const ALIKE: f64 = 0.55;

/// Longer names, in bytes, are like no other one; comparing takes the product of both lengths.
const LONGEST: usize = 200;

fn plain(name: &str) -> String {
    name.to_lowercase().replace('-', "_")
}

fn likeness(a: &str, b: &str) -> f64 {
    if a.len().max(b.len()) > LONGEST {
        return 0.0;
    }
    strsim::normalized_damerau_levenshtein(&plain(a), &plain(b))
}

/// The name most like `wanted`, if one is like it at all; the first of equals.
pub(super) fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut best = None;
    let mut best_likeness = ALIKE;
    for name in names {
        let likeness = likeness(wanted, name);
        if likeness > best_likeness || (best.is_none() && likeness == ALIKE) {
            (best, best_likeness) = (Some(name), likeness);
        }
    }
    best
}

/// `` `a`, `b`, `c` ``
pub(super) fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// What is wrong with `section.name` where the section exists and the key does not.
pub(super) fn unknown_key(section: &str, name: &str) -> String {
    let unknown = format!("unknown key `{section}.{name}`");
    let here = || KEYS.iter().filter(|key| key.section == section);
    match meant(section, name) {
        Some(key) if key.section == section => format!("{unknown}; did you mean `{}`?", key.name),
        Some(key) if key.name == plain(name) => format!("{unknown}; `{}` belongs in [{}]", key.name, key.section),
        Some(key) => format!("{unknown}; did you mean `{}`?", key.path()),
        None => format!("{unknown}; [{section}] holds {}", listed(&here().map(|key| key.name).collect::<Vec<_>>())),
    }
}

/// What is wrong with a key that stands outside all sections.
pub(super) fn key_without_section(name: &str) -> String {
    let unknown = format!("`{name}` stands in no section");
    match meant("", name) {
        Some(key) if key.name == plain(name) => format!("{unknown}; `{}` belongs in [{}]", key.name, key.section),
        Some(key) => format!("{unknown}; did you mean `{}`?", key.path()),
        None => format!("{unknown}; the sections are {}", listed(&SECTIONS)),
    }
}

/// What is wrong with a section that does not exist.
pub(super) fn unknown_section(name: &str) -> String {
    let unknown = format!("unknown section [{name}]");
    match nearest(name, SECTIONS) {
        Some(section) => format!("{unknown}; did you mean [{section}]?"),
        None => format!("{unknown}; the sections are {}", listed(&SECTIONS)),
    }
}

/// The key that was probably meant: the same name or another program's name for it, in this section first; else the
/// name most like it, wherever it stands.
fn meant(section: &str, name: &str) -> Option<&'static Key> {
    let own_first = || {
        let (own, others): (Vec<_>, Vec<_>) = KEYS.iter().partition(|key| key.section == section);
        own.into_iter().chain(others)
    };
    let wanted = plain(name);
    let called = |key: &&Key| key.name == wanted || key.others.contains(&wanted.as_str());
    own_first().find(called).or_else(|| {
        let name = nearest(name, own_first().map(|key| key.name))?;
        own_first().find(|key| key.name == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_key() {
        assert!(unknown_key("objective", "betta").ends_with("`objective.betta`; did you mean `beta`?"));
        assert!(unknown_key("train", "learning-rate").ends_with("did you mean `learning_rate`?"));
        assert!(unknown_key("train", "betta").ends_with("did you mean `objective.beta`?"));
    }

    #[test]
    fn another_programs_name_finds_its_key() {
        assert!(unknown_key("train", "lr").ends_with("did you mean `learning_rate`?"));
        assert!(unknown_key("train", "loss_type").ends_with("did you mean `objective.loss`?"));
    }

    #[test]
    fn a_key_in_the_wrong_section_is_sent_home() {
        assert!(unknown_key("train", "beta").ends_with("`beta` belongs in [objective]"));
        assert!(key_without_section("beta").ends_with("`beta` belongs in [objective]"));
    }

    #[test]
    fn nothing_alike_lists_what_there_is() {
        assert!(unknown_key("model", "quux").ends_with("[model] holds `base`, `revision`"));
        assert!(unknown_section("zzz").contains("the sections are `model`, `adapter`"));
        assert!(unknown_section("optimise").contains("the sections are"));
        assert!(unknown_section("objektive").ends_with("did you mean [objective]?"));
    }
}

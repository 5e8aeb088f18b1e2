//! Which linear layers a `target_modules` means, as PEFT reads it (`check_target_module_exists` in
//! `peft/tuners/tuners_utils.py`), and PEFT's patterns over module names.

use std::collections::BTreeSet;

use fancy_regex::{Regex, RegexBuilder};

use crate::recipe::TargetModules;
use crate::{Error, Result};

/// All linear layers but the output head.
pub const ALL_LINEAR: &str = "all-linear";

/// Most bytes of a compiled pattern: one that names every layer by number has a tenth of it.
const MAX_REGEX: usize = 1 << 20;

/// The output head's module.
const HEAD: &str = "lm_head";

/// The layers of `linear_modules` that the recipe's `target` means, in their order.
///
/// # Errors
/// [`Error::Recipe`] where the regex is none, or where it or a name of the list matches no layer: PEFT lets such a
/// name pass as long as another one matches, and the layer that was meant stays untrained.
pub fn select(target: &TargetModules, linear_modules: &[String]) -> Result<Vec<String>> {
    let bad = |reason: String| Error::recipe(format!("adapter.target_modules: {reason}"));
    let matcher = Matcher::new(target).map_err(bad)?;
    let nothing = |what: &str| {
        let known: BTreeSet<&str> = linear_modules.iter().map(|module| last_part(module)).collect();
        let known: Vec<&str> = known.into_iter().collect();
        bad(format!("{what} matches no linear layer; the layers here end in {}", known.join(", ")))
    };
    if let TargetModules::List(names) = target
        && let Some(name) = names.iter().find(|name| !linear_modules.iter().any(|module| ends_in(module, name)))
    {
        return Err(nothing(&format!("{name:?}")));
    }
    let mut selected = Vec::new();
    for module in linear_modules {
        if matcher.matches(module).map_err(bad)? {
            selected.push(module.clone());
        }
    }
    match (selected.is_empty(), target) {
        (false, _) => Ok(selected),
        (true, TargetModules::Pattern(pattern)) => Err(nothing(&format!("{pattern:?}"))),
        (true, TargetModules::List(_)) => Err(nothing("the empty list")),
    }
}

/// A `target_modules` ready to be held against names.
pub(super) enum Matcher<'a> {
    AllLinear,
    Regex(Regex),
    List(&'a [String]),
}

impl<'a> Matcher<'a> {
    pub fn new(target: &'a TargetModules) -> std::result::Result<Self, String> {
        match target {
            TargetModules::List(names) => Ok(Self::List(names)),
            TargetModules::Pattern(pattern) if pattern.eq_ignore_ascii_case(ALL_LINEAR) => Ok(Self::AllLinear),
            TargetModules::Pattern(pattern) => Ok(Self::Regex(full_match(pattern)?)),
        }
    }

    pub fn matches(&self, module: &str) -> std::result::Result<bool, String> {
        match self {
            Self::AllLinear => Ok(last_part(module) != HEAD),
            Self::Regex(regex) => is_match(regex, module),
            Self::List(names) => Ok(names.iter().any(|name| ends_in(module, name))),
        }
    }
}

/// A value by module name: `rank_pattern` and `alpha_pattern`. The first pattern that matches counts.
#[derive(Debug, Clone)]
pub(super) struct Patterns<T>(Vec<(String, Regex, T)>);

impl<T: Copy> Patterns<T> {
    pub fn none() -> Self {
        Self(Vec::new())
    }

    pub fn new(entries: Vec<(String, T)>) -> std::result::Result<Self, String> {
        let compile = |(pattern, value): (String, T)| {
            let regex = full_match(&format!(r"(?:.*\.)?(?:{pattern})"))?;
            Ok((pattern, regex, value))
        };
        entries.into_iter().map(compile).collect::<std::result::Result<_, String>>().map(Self)
    }

    pub fn of(&self, module: &str) -> std::result::Result<Option<T>, String> {
        for (_, regex, value) in &self.0 {
            if is_match(regex, module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    pub fn entries(&self) -> impl Iterator<Item = (&str, T)> {
        self.0.iter().map(|(pattern, _, value)| (pattern.as_str(), *value))
    }
}

/// The last dotted part of a name.
pub(crate) fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

fn ends_in(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn full_match(pattern: &str) -> std::result::Result<Regex, String> {
    let pattern_whole = format!(r"\A(?:{pattern})\z");
    RegexBuilder::new(&pattern_whole)
        .delegate_size_limit(MAX_REGEX)
        .build()
        .map_err(|e| format!("{pattern:?} is no regular expression: {e}"))
}

/// The engine gives up on a pattern that backtracks without end.
fn is_match(regex: &Regex, module: &str) -> std::result::Result<bool, String> {
    regex.is_match(module).map_err(|e| format!("the regular expression cannot be matched against {module:?}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<String> {
        let mut names = Vec::new();
        for layer in 0..2 {
            for name in ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"] {
                names.push(format!("model.layers.{layer}.{name}"));
            }
        }
        names.push("lm_head".into());
        names
    }

    fn pattern(text: &str) -> TargetModules {
        TargetModules::Pattern(text.into())
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::List(names.iter().map(|n| n.to_string()).collect())
    }

    #[test]
    fn names_mean_what_peft_says() {
        let all = modules();
        let chosen = |target: &TargetModules| select(target, &all).unwrap();
        assert_eq!(chosen(&pattern("all-linear")), all[..6]);
        assert_eq!(chosen(&pattern("ALL-LINEAR")), all[..6]);
        assert_eq!(chosen(&list(&["q_proj", "up_proj"])), [&all[0], &all[2], &all[3], &all[5]].map(String::clone));
        assert_eq!(chosen(&list(&["1.mlp.up_proj", "lm_head"])), all[5..]);
        assert_eq!(chosen(&pattern(r"model\.layers\.1\..*(?<!up)_proj")), all[3..5]);
        assert_eq!(chosen(&pattern("lm_head|.*q_proj")), [&all[0], &all[3], &all[6]].map(String::clone));
    }

    #[test]
    fn what_matches_nothing_is_refused_with_what_there_is() {
        let cases = [
            (
                list(&["q_proj", "q_prj"]),
                "\"q_prj\" matches no linear layer; the layers here end in lm_head, o_proj, q",
            ),
            (list(&["proj"]), "\"proj\" matches no"),
            (list(&[]), "the empty list matches no"),
            (pattern("q_proj"), "\"q_proj\" matches no"),
            (pattern("(q_proj"), "\"(q_proj\" is no regular expression"),
        ];
        for (target, reason) in cases {
            let error = select(&target, &modules()).unwrap_err();
            assert!(error.to_string().contains(reason), "said {error}, not {reason}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let patterns = Patterns::new(vec![
            ("layers.1.self_attn.q_proj".into(), 1),
            ("q_proj".into(), 2),
            (r"model\.layers\.\d+\.mlp\..*".into(), 3),
        ])
        .unwrap();
        let values: Vec<_> = modules().iter().map(|module| patterns.of(module).unwrap()).collect();
        assert_eq!(values, [Some(2), None, Some(3), Some(1), None, Some(3), None]);
    }
}

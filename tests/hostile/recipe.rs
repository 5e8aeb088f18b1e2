//! Recipes: a wrong one is the user's own to mend, exit 2, with its line.

use crate::openers::Kind;
use crate::{Case, case};

/// The bench's own with lines put after it, which begin at line 19.
fn more(lines: &str) -> Vec<u8> {
    [&Kind::Recipe.seeds()[0], lines.as_bytes()].concat()
}

pub fn recipes() -> Vec<Case> {
    const TOML: &[&str] = &["recipe.toml:19: not valid TOML"];
    vec![
        case("nothing", "", &["recipe.toml:1: `model.base` is missing"]),
        case("no UTF-8", b"\xff\xfe".to_vec(), &["recipe.toml: is not UTF-8 text"]),
        case(
            "a megabyte and a byte",
            vec![b'#'; (1 << 20) + 1],
            &["recipe.toml: no recipe has more than 1048576 bytes"],
        ),
        case("65 MiB", vec![b'\n'; 65 << 20], &["recipe.toml: no recipe has more"]),
        case("a section left open", more("[train"), TOML),
        case("a text left open", more("x = \"a"), TOML),
        case("a long text left open", more("x = '''a"), &["recipe.toml:19: not valid TOML"]),
        case("no value", more("x ="), TOML),
        case("a key twice", more("device = \"cpu\""), &["recipe.toml:19: not valid TOML: duplicate key"]),
        case("a section twice", more("[model]\n"), &["recipe.toml:19: ", "not valid TOML"]),
        case("a section as a list", more("[[memory]]\n"), &["`memory` is a section, not a value"]),
        case("a zero byte", more("x = \"\0\""), TOML),
        case("a control character", more("x = \"\x1b[2J\""), TOML),
        case("half a surrogate pair", more("x = \"\\ud800\""), TOML),
        case("depth of lists", more(&format!("x = {}", "[".repeat(100_000))), &["recipe.toml:19: "]),
        case("depth of tables", more(&format!("x = {}", "{a=".repeat(100_000))), &["recipe.toml:19: "]),
        case(
            "depth of dotted keys",
            more(&format!("x{} = 1", ".a".repeat(400_000))),
            &["not valid TOML: recursion limit"],
        ),
        case(
            "depth of a section",
            more(&format!("[train{}]\nx = 1", ".a".repeat(400_000))),
            &["not valid TOML: recursion limit"],
        ),
        case(
            "depth of closed lists",
            more(&format!("x = {}{}", "[".repeat(70), "]".repeat(70))),
            &["unknown key `run.x`"],
        ),
        case(
            "an unknown key that is a command",
            more("\"\\u001b[2J\" = 1"),
            &["recipe.toml:19: unknown key `run.\\u{1b}[2J`"],
        ),
        case(
            "an unknown key of a megabyte",
            more(&format!("{} = 1", "k".repeat(1_000_000))),
            &["recipe.toml:19: unknown key `run.kkk", "characters left out"],
        ),
        case("an unknown section", more("[evil]\nx = 1"), &["recipe.toml:19: unknown section [evil]"]),
        case("a section in a section", more("[train.more]\nx = 1"), &["recipe.toml:19: unknown key `train.more`"]),
        case(
            "a number past 64 bits",
            more("threads = 99999999999999999999"),
            &["recipe.toml:19: 99999999999999999999 is too large"],
        ),
        case("a number below 0", more("threads = -1"), &["`run.threads` is the number -1"]),
        case("a number in hex past 64 bits", more("threads = 0xfffffffffffffffff"), &["recipe.toml:19: "]),
        case("not a number", more("threads = nan"), &["`run.threads`"]),
        case("a time", more("threads = 1979-05-27T07:32:00Z"), &["recipe.toml:19: `run.threads`"]),
        case("a list", more("threads = [[[]]]"), &["recipe.toml:19: `run.threads`"]),
        case("a table", more("threads = {a = 1}"), &["recipe.toml:19: "]),
        case("an infinite budget", more("[samples]\ntemperature = inf"), &["recipe.toml:20: `samples.temperature`"]),
        case(
            "a list of 200,000 prompts of numbers",
            more(&format!("[samples]\nprompts = [{}]", "1,".repeat(200_000))),
            &["recipe.toml:20: `samples.prompts`"],
        ),
        case(
            "a device of rubbish",
            "[model]\nbase = \"./base\"\n[data]\ntrain = [\"rows.jsonl\"]\n[run]\ndevice = \"cuda:99999999999999999999\"",
            &["recipe.toml:6: `run.device`"],
        ),
        case(
            "a base that climbs",
            "[model]\nbase = \"a/../../../b\"\n[data]\ntrain = [\"rows.jsonl\"]",
            &["recipe.toml:2: `model.base`"],
        ),
        case(
            "a base with a zero byte",
            "[model]\nbase = \"a\\u0000b\"\n[data]\ntrain = [\"rows.jsonl\"]",
            &["recipe.toml:2: `model.base`"],
        ),
        case(
            "rows of the web",
            "[model]\nbase = \"./base\"\n[data]\ntrain = [\"http://x/y\"]",
            &["recipe.toml:4: ", "download it first"],
        ),
        case(
            "rows of a script",
            "[model]\nbase = \"./base\"\n[data]\ntrain = [\"file:///etc/passwd\"]",
            &["recipe.toml:4: "],
        ),
        case("a glob that is none", "[model]\nbase = \"./base\"\n[data]\ntrain = [\"***/[\"]", &["recipe.toml:4: "]),
        case(
            "a regex that is none",
            "[model]\nbase = \"./base\"\n[adapter]\ntarget_modules = \"(\"\n[data]\ntrain = [\"rows.jsonl\"]",
            &["recipe.toml:4: ", "the regex \"(\" cannot be used"],
        ),
        case(
            "a regex of any size",
            "[model]\nbase = \"./base\"\n[adapter]\ntarget_modules = \"((a{999}){999}){999}\"\n[data]\ntrain = [\"rows.jsonl\"]",
            &["recipe.toml:4: ", "cannot be used"],
        ),
        case("a pickle", b"\x80\x04\x95".to_vec(), &["recipe.toml: is not UTF-8"]),
    ]
}

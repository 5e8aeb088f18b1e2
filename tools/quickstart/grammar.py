"""A grammar of short film reviews, and the label that it gives to a text.

A review is a neutral opening (what was seen, by whom, where) and a continuation of one or two
sentences that praises or pans it. Both kinds share every frame, noun and adverb; only the words
of `OPINION` tell them apart, and each of those belongs to one side. So the label of any text,
the grammar's own or a model's, is the sign of (positive words - negative words).

The grammar is data (`RULES`), read twice: `Grammar.review` samples from it, `Grammar.accepts`
turns it into a regular expression that tells whether it could have made a text.
"""

import math
import random
import re

MIN_WORDS, MAX_WORDS = 15, 40

# name: (positive words, negative words). Single lower-case words; no word on both sides.
OPINION = {
    "ADJ": (
        "brilliant superb delightful charming wonderful gripping graceful dazzling heartfelt "
        "magnificent touching witty radiant splendid memorable captivating elegant stunning fresh "
        "lovely",
        "dreadful awful tedious clumsy terrible dull lifeless grating shallow boring horrible lazy "
        "stale bland tiresome forgettable muddled wooden ugly predictable",
    ),
    "VERBED": (
        "loved adored enjoyed admired treasured relished",
        "hated despised loathed regretted resented detested",
    ),
    "VERBS": (
        "shines sparkles soars delights charms triumphs glows succeeds",
        "drags stumbles fails collapses disappoints falters flounders bores",
    ),
    "NOUN": (
        "masterpiece triumph gem treasure joy delight marvel wonder",
        "disaster mess bore dud failure disgrace chore letdown",
    ),
    "MOOD": (
        "smiling thrilled moved delighted elated grateful",
        "annoyed frustrated angry bored disappointed furious",
    ),
    "DUE": (
        "praise applause awards acclaim",
        "scorn ridicule mockery blame",
    ),
    "WELL": (
        "beautifully brilliantly gracefully masterfully wonderfully superbly",
        "badly poorly clumsily terribly horribly awkwardly",
    ),
}

# name: alternatives, all equally likely (one written twice is twice as likely).
# {name} is another rule or a list of words; `a(n)` becomes the article that fits.
RULES = {
    "opening": [
        "{title} is a(n) {genre} about {subject}, directed by {name}.",
        "{title} is {name}'s {ordinal} {genre} and tells of {subject}.",
        "I watched {title} with my {companion} on {day} {daytime}.",
        "We saw {title} at the {venue} on {day} {daytime}.",
        "{name} plays {subject} in {title}, a(n) {genre} set in {place}.",
        "My {companion} chose {title} for our {occasion}.",
        "In {title}, {name} plays {subject} who travels to {place}.",
        "Set in {place}, {title} follows {subject} and {subject}.",
        "After {number} years, {name} returns with a(n) {genre} called {title}.",
        "The {ordinal} {genre} by {name} follows {subject} through {place}.",
        "{title} opened at the {venue} in {month}, with {name} as {subject}.",
        "Based on a novel by {name}, {title} is about {subject} in {place}.",
    ],
    "continuation": [
        *["{opinion}. {opinion}."] * 12,
        *["{opinion}, and {opinion}."] * 4,
        *["{remark}. {opinion}."] * 2,
        "{opinion}. {remark}.",
        "{opinion}.",
    ],
    "opinion": [
        "the {aspect} is {degree} {ADJ}",
        "the {aspect} feels {ADJ} and {ADJ}",
        "the {aspects} are {degree} {ADJ}",
        "every scene with the {figure} is {ADJ}",
        "I {degree} {VERBED} the {aspect}",
        "I {VERBED} the {aspects} and the {aspect}",
        "the {figure} gives a(n) {ADJ} performance",
        "the {aspect} {VERBS} from {start} to {finish}",
        "it is a(n) {ADJ} {NOUN}",
        "what a(n) {NOUN} this {film} is",
        "I left the {venue} {MOOD}",
        "by the {ordinal} act I was {MOOD}",
        "the {film} is {WELL} {made}",
        "the {aspects} are {WELL} done",
        "the {figure} deserves {DUE} for the {aspect}",
        "{ADJ} {aspects} and the {ADJ} {aspect} make it a(n) {NOUN}",
        "with its {ADJ} {aspects}, the {film} {VERBS}",
        "{name} has made a(n) {ADJ} {film}",
        "for my {companion} it was a(n) {NOUN}, {WELL} {made}",
        "even the {ordinal} hour is {ADJ}",
    ],
    "remark": [
        "the story takes place over {number} days",
        "most of it was filmed in {place}",
        "the {figure} appears in almost every scene",
        "it runs for {number} minutes",
        "the {aspects} come from {place}",
        "the {aspect} is by {name}",
        "my {companion} read the book in {month}",
        "the camera stays with the {figure} for {number} minutes",
    ],
    "title": ["The {cover} {emblem}", "{emblem} in {place}", "The {emblem} of {place}", "{cover} {emblems}"],
    "name": ["{first} {last}"],
    "subject": ["a(n) {trait} {job}", "a(n) {job} from {place}", "{number} {jobs}"],
}

WORDS = {
    "genre": "thriller drama comedy western mystery romance musical documentary biography fantasy",
    "companion": "sister brother mother father cousin neighbor uncle aunt roommate grandmother colleague teacher",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "daytime": "morning afternoon evening night",
    "month": "January February March April May June July August September October November December",
    "venue": "theater cinema festival museum library school club studio",
    "occasion": "anniversary holiday reunion birthday trip weekend party class",
    "ordinal": "first second third fourth fifth sixth seventh final",
    "number": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty ninety",
    "place": "Lisbon Oslo Kyoto Boston Cairo Lima Dublin Prague Havana Bergen Naples Quebec Texas Iceland "
    "Kenya Norway Chicago Marseille Vienna Tangier",
    "job": "sailor baker lawyer painter teacher nurse farmer pilot detective violinist chemist gardener "
    "tailor widow student soldier journalist fisherman librarian mechanic",
    "jobs": "sailors bakers lawyers painters nurses farmers pilots detectives students soldiers strangers "
    "brothers sisters neighbors cousins travelers",
    "trait": "young old retired quiet stubborn lonely nervous famous local foreign married wandering tall curious",
    "cover": "Silent Hidden Northern Distant Paper Crimson Winter Borrowed Glass Copper Midnight Narrow "
    "Seventh Amber Salt Velvet Iron Blue Green Southern",
    "emblem": "Harbor River Garden Letter Mirror Orchard Bridge Lantern Station Island Clock Tower Forest "
    "Train Kitchen Window Desert Song Map House Lighthouse Corridor Passenger Road",
    "emblems": "Harbors Rivers Gardens Letters Mirrors Bridges Lanterns Islands Clocks Towers Trains Windows "
    "Songs Maps Houses Roads",
    "first": "Mara Anton Clara Jonas Irene Felix Nadia Oscar Paula Victor Ruth Simon Greta Hugo Elena Marcus "
    "Alice Peter Rosa Walter",
    "last": "Ellison Moreau Lindqvist Okafor Harper Novak Tanaka Bellini Castillo Weber Hansen Doyle Ferreira "
    "Marsh Petrov Quinn Sato Turner Abbott Whitlock",
    "aspect": "acting plot score dialogue ending script story pacing editing lighting soundtrack premise cast "
    "humor direction romance music photography",
    "aspects": "jokes costumes characters scenes songs effects twists performances landscapes conversations "
    "stunts sets visuals lyrics",
    "figure": "lead hero villain detective narrator director actress actor writer child composer stranger",
    "film": "film movie picture story production adaptation",
    "degree": "truly simply quite utterly rather really thoroughly consistently absolutely honestly always "
    "completely",
    "made": "written paced shot edited acted directed staged lit",
    "start": "start beginning opening",
    "finish": "finish end credits",
}

LABELS = {
    side: sorted(word for pair in OPINION.values() for word in pair[index].split())
    for index, side in enumerate(("positive", "negative"))
}
_SIGN = {word: sign for side, sign in (("positive", 1), ("negative", -1)) for word in LABELS[side]}
_SLOT = re.compile(r"\{(\w+)\}")


def words(text):
    """The text's words: runs of letters, lower-case."""
    return re.findall(r"[a-z]+", text.lower())


def label(text):
    """`"positive"`, `"negative"`, or None where neither side has more words."""
    balance = sum(_SIGN.get(word, 0) for word in words(text))
    return "positive" if balance > 0 else "negative" if balance < 0 else None


class Grammar:
    """Samples reviews with a seed of its own and tells how likely each was."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self._pattern = re.compile(
            "|".join(f"(?:{_regex('continuation', side)})" for side in (0, 1)), re.IGNORECASE
        )

    def opening(self):
        """A neutral opening."""
        return _finish(self._expand("opening", None)[0])

    def continuation(self, positive):
        """A continuation (with its leading space) that praises or pans, and its log-probability."""
        text, logp = self._expand("continuation", 0 if positive else 1)
        return " " + _finish(text), logp

    def review(self, positive, opening=None):
        """(opening, continuation, the continuation's log-probability before `fits` thins them out)."""
        while True:
            head = opening or self.opening()
            tail, logp = self.continuation(positive)
            if fits(head, tail):
                return head, tail, logp

    def opinions(self, positive, count):
        """`count` sentences of opinion in a row, all of one mind."""
        side = 0 if positive else 1
        return " " + _finish(" ".join(self._expand("opinion", side)[0] + "." for _ in range(count)))

    def accepts(self, continuation):
        """Whether a continuation is one that the grammar makes, of one mind throughout."""
        return self._pattern.fullmatch(continuation.strip()) is not None

    def _expand(self, symbol, side):
        alternatives = _alternatives(symbol, side)
        chosen = self.rng.choice(alternatives)
        logp = math.log(alternatives.count(chosen) / len(alternatives))

        def fill(match):
            nonlocal logp
            text, part = self._expand(match[1], side)
            logp += part
            return text

        return _SLOT.sub(fill, chosen), logp


def fits(opening, continuation):
    """The two rules that no alternative can state: length, and no word of weight said twice."""
    weighty = [word for word in words(continuation) if word in _SIGN or word in _SUBJECTS]
    return (
        MIN_WORDS <= len(words(opening + continuation)) <= MAX_WORDS
        and len(weighty) == len(set(weighty))
    )


_SUBJECTS = set(f"{WORDS['aspect']} {WORDS['aspects']} {WORDS['degree']}".split())


def _alternatives(symbol, side):
    if symbol in RULES:
        return RULES[symbol]
    if symbol in OPINION:
        return OPINION[symbol][side].split()
    return WORDS[symbol].split()


def _finish(text):
    """Articles that fit, and a capital at the head of every sentence."""
    text = re.sub(r"a\(n\) (?=(\w))", lambda m: "an " if m[1].lower() in "aeiou" else "a ", text)
    return re.sub(r"(^|\. )(\w)", lambda m: m[1] + m[2].upper(), text)


def _regex(symbol, side):
    """The regular expression of everything that `symbol` can become."""

    def of(alternative):
        parts = _SLOT.split(alternative)  # literal, slot, literal, ...
        return "".join(
            _regex(part, side) if index % 2 else re.escape(part).replace(r"a\(n\)", "an?")
            for index, part in enumerate(parts)
        )

    return "(?:" + "|".join(dict.fromkeys(map(of, _alternatives(symbol, side)))) + ")"


def check(reviews=20_000, seed=7):
    """Asserts what the quickstart promises of its text; returns the figures."""
    positive, negative = set(LABELS["positive"]), set(LABELS["negative"])
    assert len(positive) >= 40 and len(negative) >= 40
    assert not positive & negative, positive & negative
    opinion = [word for pair in OPINION.values() for side in pair for word in side.split()]
    assert len(opinion) == len(set(opinion)), "an opinion word stands in two lists"
    for symbol, texts in (RULES | {s: [t] for s, t in WORDS.items()}).items():
        shared = set(words(_SLOT.sub(" ", " ".join(texts)))) & (positive | negative)
        assert not shared, f"{symbol} says {shared}, which are opinions"

    grammar, forms, sentences, surprise, lengths = Grammar(seed), set(), set(), 0.0, 0
    for index in range(reviews):
        side = index % 2 == 0
        head, tail, logp = grammar.review(side)
        text = head + tail
        assert label(head) is None and label(text) == label(tail) == ("positive" if side else "negative"), text
        assert grammar.accepts(tail), text
        forms.update(words(text))
        sentences.update(re.split(r"(?<=\.) ", text))
        surprise -= logp
        lengths += len(words(text))
    drawn = Grammar(seed + 1)
    kept = sum(fits(drawn.opening(), drawn.continuation(i % 2 == 0)[0]) for i in range(reviews)) / reviews
    # A kept text is 1/kept times likelier than its derivation, and the side is one more bit.
    entropy = surprise / reviews + math.log(kept) + math.log(2)
    assert len(forms) >= 300 and len(sentences) >= 5000
    return {
        "word_forms": len(forms),
        "distinct_sentences": len(sentences),
        "positive_words": len(positive),
        "negative_words": len(negative),
        "mean_words": lengths / reviews,
        "continuation_nats": entropy,
    }


if __name__ == "__main__":
    for name, figure in check().items():
        print(f"{name:20} {figure:.4g}" if isinstance(figure, float) else f"{name:20} {figure}")
    shown = Grammar(0)
    for index in range(8):
        opening, continuation, _ = shown.review(index % 2 == 0)
        print(f"{label(continuation):8} {opening}|{continuation}")

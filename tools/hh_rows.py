#!/usr/bin/env python3
"""Anthropic's HH dialogues as rows of prompt, chosen, rejected, as the benchmarks take them.

    tools/hh_rows.py test.jsonl.gz > rows.jsonl

The argument is a file of `Anthropic/hh-rlhf` on the hub (harmless-base/test.jsonl.gz for the figures in docs/): each line
two dialogues. The prompt is what both share, up to and with the last "Assistant:" in it.
"""
import gzip, json, os, sys

TURN = "\n\nAssistant:"


def row(chosen, rejected):
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(TURN) + len(TURN)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


opened = gzip.open if sys.argv[1].endswith(".gz") else open
for line in opened(sys.argv[1], "rt", encoding="utf-8"):
    dialogues = json.loads(line)
    if TURN in os.path.commonprefix([dialogues["chosen"], dialogues["rejected"]]):
        print(json.dumps(row(dialogues["chosen"], dialogues["rejected"]), ensure_ascii=False))

"""Training beside TRL's RewardTrainer and plain padded pairs: pairs/s, memory, loss curves.

    python benchmarks/train/bench.py [--data ../shared/data/open] [--home DIR] [--quick]

One Llama from random weights (10 M parameters), real triples of `oasst_sampling`, ids made
beforehand, both cores, all in bf16 autocast where the CPU has bf16 and in fp32 elsewhere. Every
contender is a process in an environment of its own and they take turns; a repeat is a step to warm
up and two timed steps of 21 pairs. All run the same pairs. TRL runs them in random order and, as
grouping by length would, sorted over all repeats (short with short, long with long), each at the
fastest settings found; a ratio is against the faster of the two. The plain loop runs as many pairs
at once as TRL does. With `--threads 1` seconds are CPU seconds, so other work on the machine does
little harm; with `--device cuda` a GPU runs them, for which `--width 1024 --layers 16` is a better
size. Environments are made in the home on the first run (TRL's has 1.5 GB). Stop it whenever
you like: what was timed with this code is kept in the home, and the same command goes on. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triples
import wire
from contenders import BEGAN, HERE, PEERS, ROOT, Contender, python_of, say
from race import Race
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from trainer.language_model import train_tokenizer
from trainer.layout import fast_bf16
from trainer.model import quiet
from trainer.template import Limits, Template, Texts

CONTEXT = 2048


def make_model(
    folder: Path, drawn: dict[int, list[triples.Triples]], width: int, layers: int, quick: bool
) -> Template:
    """Write the classifier with random weights and its tokenizer; the template that makes ids."""
    groups = [group for k in sorted(drawn) for group in drawn[k]]
    texts = [text for g in groups for text in (g.prompt, g.reference, *g.candidates)]
    train_tokenizer(texts, 4096, folder, context=CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    width, layers = (64, 2) if quick else (width, layers)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 64 else 2,
        num_key_value_heads=width // 64 if width > 64 else 2,
        max_position_embeddings=CONTEXT,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = LlamaForSequenceClassification(config)
    with quiet():
        network.save_pretrained(folder)
    say(f"model: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    return Template(tokenizer, Limits.for_context(256 if quick else CONTEXT))


def encode(template: Template, drawn: list[triples.Triples]) -> list[triples.Sequences]:
    """Every group's sequences; those whose cut texts became equal are left out."""
    found = template.encode(
        [Texts(g.prompt, g.reference, g.candidates, "pretrain") for g in drawn], one_prompt=True
    )
    return [group for group in found if all(group[0] != other for other in group[1:])]


def identity(where: str, weights: Path) -> str:
    """A digest of what seconds depend on beside what is asked: code, weights, clock and device."""
    files = [*sorted((ROOT / "trainer").glob("*.py")), *sorted(HERE.glob("*.py")), weights]
    total = hashlib.blake2b(where.encode(), digest_size=6)
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("POLAR_DATA", str(ROOT.parent / "shared" / "data" / "open"))
    home = Path(os.environ.get("POLAR_HOME", ROOT / "var")) / "bench" / "train"
    parser.add_argument("--data", default=data)
    parser.add_argument("--home", default=str(home))
    parser.add_argument("--environments", help="the peers' environments (default: in the home)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--curve-steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small and unmeasured: does it run?")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    if options.width % 64:
        parser.error(f"--width {options.width}: heads have 64 elements; give a multiple of 64")
    folder = Path(options.home).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environments = Path(options.environments or folder / "environments").resolve()
    pythons = {"ours": sys.executable, **{p: python_of(p, environments) for p in PEERS}}

    precision = options.precision
    if precision == "auto":
        precision = "bf16" if fast_bf16(torch.device(options.device)) else "fp32"
    few = 1 if options.quick else 3
    count = {2: 1 if options.quick else options.repeats}
    count |= {4: count[2], 8: min(count[2], few)}
    rng = np.random.default_rng(1)
    say(f"drawing triples of {triples.SOURCE} from {options.data}")
    need = {k: 3 * n * (triples.PAIRS // (k - 1)) for k, n in count.items()}
    many = {k: n * (12 if k == 4 else 1) + 20 for k, n in need.items()}
    drawn = {k: triples.draw(Path(options.data), k, n, rng) for k, n in many.items()}
    template = make_model(folder / "model", drawn, options.width, options.layers, options.quick)
    groups = {k: encode(template, drawn[k]) for k in drawn}
    shapes = {f"mixed_k{k}": (groups[k][: need[k]], k, count[k]) for k in need}
    rest = sorted(groups[4][need[4] :], key=triples.longest)
    quarter = len(rest) // 4
    shapes |= {
        name: ([part[i] for i in rng.permutation(len(part))], 4, min(few, 2))
        for name, part in (("short_k4", rest[:quarter]), ("long_k4", rest[-quarter:]))
    }
    ready = {
        name: triples.repeats(triples.steps(part, k), n) for name, (part, k, n) in shapes.items()
    }
    clock = "cpu" if options.threads == 1 and options.device == "cpu" else "wall"
    own = {wire.CLOCK: clock, wire.ON: options.device}
    scripts = {"ours": "ours.py", "trl": "trl_peer.py", "padded": "padded_peer.py"}
    contenders = {
        name: Contender(pythons[name], script, folder / "model", folder / f"{name}.log", **own)
        for name, script in scripts.items()
    }
    where = f"{clock} {options.device}"
    answers = folder / "answers" / identity(where, folder / "model" / "model.safetensors")
    answers.mkdir(parents=True, exist_ok=True)
    race = Race(contenders, options.threads, precision, options.device, options.quick, answers)
    results: dict[str, Any] = {}
    try:
        race.contenders["ours"].run(
            "score", ready["mixed_k4"][0][:1], threads=options.threads, bf16=race.bf16
        )
        first = [[p for g in s for p in triples.pairs(g)] for s in ready["mixed_k4"][0]]
        race.search({False: first[:2], True: [first[0], triples.by_length([first[1:]])[0][0]]})
        say(f"TRL runs with {race.settings[False]}, sorted with {race.settings[True]}")
        curve = triples.steps(groups[4], 4)[: 2 if options.quick else options.curve_steps]
        results["curves"] = race.curves(curve)
        say(f"losses in fp32 differ by {results['curves']['largest_relative_difference']}")
        for name, repeats in ready.items():
            results[name] = race.compare(name, repeats)
            print(json.dumps({name: results[name]}), flush=True)
        results["scoring_k4"] = race.scoring(ready["mixed_k4"][:few])
    finally:
        for contender in contenders.values():
            contender.stop()
    ratios = {f"ratio_vs_trl_k{k}": results[f"mixed_k{k}"]["ratio_vs_trl"] for k in (2, 4, 8)}
    settings = {"random": race.settings[False], "sorted": race.settings[True]}
    run = {
        "threads": options.threads,
        "device": options.device,
        "clock": clock,
        "precision": precision,
        "quick": options.quick,
        "seconds": round(time.perf_counter() - BEGAN),
    }
    print(json.dumps({**ratios, "trl_settings": settings, **results, **run}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")

"""Trains a real encoder with Algorithm 1 of arXiv 2501.10661 and without; writes results.json.

    python evals/peft/study.py

The base is all-MiniLM-L6-v2, the task is to tell how positive a text is, on the 23,700 rated texts
of vaderSentiment's sources: tweets, product reviews, film reviews, editorials. Both come from the
package index and are kept in the user's cache. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from outliermerge import rng  # noqa: E402

RESULTS, TABLE = Path(__file__).with_name("results.json"), Path(__file__).with_name("README.md")
SOURCES = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
MATRICES = ["query", "key", "value", "dense"]
# The states that are rated do not pass the pooler.
WHERE = {"target_modules": MATRICES, "exclude_modules": ["pooler.dense"]}
MARKS = ("<!-- results -->\n", "<!-- end of results -->\n")


@dataclass(frozen=True)
class Arm:
    """One way to train; `config` makes peft's config from a seed."""

    title: str
    rates: tuple[float, ...]
    kind: str = "none"
    keys: Mapping[str, Any] = field(default_factory=dict)

    def adapt(self, encoder: nn.Module, seed: int, where: Mapping[str, Any] = WHERE) -> nn.Module:
        """Return the encoder with what this arm trains of it; `where` are keys of adapters."""
        import peft

        from outliermerge.peft import NoiseConfig, ScaledLoraConfig

        encoder.requires_grad_(self.kind == "full")
        if self.kind == "noise":
            return peft.get_peft_model(encoder, NoiseConfig(**where, seed=seed))
        if self.kind == "lora":
            return peft.get_peft_model(encoder, ScaledLoraConfig(**where, seed=seed, **self.keys))
        return encoder


LORA_RATES = (1e-3, 3e-3, 1e-2)
ARMS = {
    "head": Arm("head alone", (1e-3, 3e-3, 1e-2)),
    "noise": Arm("noise, W + sN", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "noise"),
    "lora": Arm("LoRA", LORA_RATES, "lora", {"r": 4, "train_scale": False}),
    "lora_s": Arm("LoRA + s", LORA_RATES, "lora", {"r": 4}),
    "lora_gp": Arm("LoRA + s, gp_pareto", LORA_RATES, "lora", {"r": 4, "init": "gp_pareto"}),
    "full": Arm("all parameters", (3e-5, 1e-4, 3e-4), "full"),
}


@dataclass(frozen=True)
class Settings:
    """Sizes and seeds; the search of the rates has a seed of its own and never sees the test."""

    num_train: int = 1024
    num_validation: int = 512
    num_test: int = 1024
    batch: int = 16
    max_tokens: int = 20
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    search_seed: int = 0


@dataclass(frozen=True)
class Texts:
    """Tokens of texts, each a list, and their ratings, scaled to about one."""

    tokens: list[list[int]]
    ratings: Tensor

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        length = max(len(self.tokens[row]) for row in rows)
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(self.tokens[row])] = torch.tensor(self.tokens[row])
            mask[place, : len(self.tokens[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}, self.ratings[list(rows)]


class Rater(nn.Module):
    """An encoder's states, their mean over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 1)
        self.head.weight.data = 0.02 * rng.standard_normal(seed, "head", 0, width).view(1, -1)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        states = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        # About one in each component, where the base's have unit length in all.
        return self.head(nn.functional.layer_norm(means, means.shape[-1:]))[:, 0]


def read_texts(archive: Path) -> list[tuple[float, str]]:
    """Return ratings from -4 to 4 and texts, each text once, from vaderSentiment's sdist."""
    return [(rating, text) for _, rating, text in read_rated(archive)]


def read_rated(archive: Path) -> list[tuple[str, float, str]]:
    """Return the source, the rating and the text of each text of vaderSentiment's sdist."""
    found: dict[str, tuple[str, float]] = {}
    with tarfile.open(archive) as outer:
        (name,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            for source in SOURCES:
                member = data.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8", errors="replace").splitlines():
                    _, rating, text = line.split("\t", 2)
                    found.setdefault(text.strip(), (source, float(rating)))
    return [(source, rating, text) for text, (source, rating) in found.items()]


def split(rows: list[tuple[float, str]], tokenizer: Any, settings: Settings) -> list[Texts]:
    """Return training, validation and test texts, by a hash of the text."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row[1].encode()).digest())
    every = tokenizer([text for _, text in rows])["input_ids"]
    short = [n for n, tokens in enumerate(every) if len(tokens) <= settings.max_tokens]
    sizes = (settings.num_train, settings.num_validation, settings.num_test)
    if len(short) < sum(sizes):
        raise SystemExit(f"{len(short)} texts of {settings.max_tokens} tokens, needs {sum(sizes)}")
    parts = []
    for size in sizes:
        chosen, short = short[:size], short[size:]
        ratings = torch.tensor([rows[n][0] for n in chosen]) / 1.5
        parts.append(Texts([every[n] for n in chosen], ratings))
    return parts


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int = 0) -> list[list[int]]:
    """Return the places of texts, each once, in random batches of texts of about one length."""
    num = len(lengths)
    order = rng.uniform(seed, "order", epoch * num, (epoch + 1) * num).argsort().tolist()
    groups = []
    for start in range(0, len(order), 16 * size):
        group = sorted(order[start : start + 16 * size], key=lambda row: lengths[row])
        groups += [group[at : at + size] for at in range(0, len(group), size)]
    num = len(groups)
    shuffled = rng.uniform(seed, "batches", epoch * num, (epoch + 1) * num).argsort().tolist()
    return [groups[place] for place in shuffled]


def factor(step: int, steps: int, warm: int) -> float:
    """Return what the rate is multiplied by: up over the first steps, then down to 0."""
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def train(rater: Rater, texts: Texts, head_rate: float, rate: float, size: int, seed: int) -> None:
    """Train for one pass, AdamW, the rates up over a tenth of the steps and down to 0."""
    own = [p for p in rater.encoder.parameters() if p.requires_grad]
    groups = [{"params": rater.head.parameters(), "lr": head_rate}]
    groups += [{"params": own, "lr": rate}] if own else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = batches([len(tokens) for tokens in texts.tokens], size, seed)
    warm = max(1, len(steps) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, len(steps), warm)
    )
    for rows in steps:
        inputs, ratings = texts.batch(rows)
        loss = (rater(inputs) - ratings).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rater.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def score(rater: Rater, texts: Texts) -> dict[str, float]:
    """Return 100 × the correlation with the ratings, and the share of right signs in percent."""
    order = sorted(range(len(texts.tokens)), key=lambda row: len(texts.tokens[row]))
    found = torch.empty(len(order))
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        found[rows] = rater(texts.batch(rows)[0])
    clear = texts.ratings.abs() > 0.5 / 1.5
    right = (found.sign() == texts.ratings.sign())[clear]
    return {
        "correlation": 100 * torch.corrcoef(torch.stack([found, texts.ratings]))[0, 1].item(),
        "sign": 100 * right.double().mean().item(),
    }


def one_run(
    arm: Arm, encoder: nn.Module, parts: Sequence[Texts], rates: tuple[float, float], seed: int,
    settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """Train once; parts are what is trained on and what is scored."""
    start = time.perf_counter()
    encoder = copy.deepcopy(encoder).eval()  # no dropout: a run is a function of its seed
    rater = Rater(arm.adapt(encoder, seed), encoder.config.hidden_size, seed)
    num_trained = sum(p.numel() for p in rater.encoder.parameters() if p.requires_grad)
    train(rater, parts[0], *rates, settings.batch, seed)
    trained = time.perf_counter() - start
    scales = {
        name.removesuffix(".default"): parameter.item()
        for name, parameter in rater.encoder.named_parameters()
        if name.endswith("_s.default")
    }
    return {
        "seed": seed,
        "num_trained": num_trained,
        "train_seconds": round(trained, 1),
        **score(rater, parts[1]),
        "scales": list(scales.values()),
    }


def one_arm(
    name: str, encoder: nn.Module, parts: Sequence[Texts], settings: Settings, head_rate: float
) -> dict[str, Any]:
    """Choose an arm's rate on the validation texts, then score it on the test for each seed."""
    torch.set_num_threads(1)
    training, validation, test = parts
    arm = ARMS[name]

    def run(rate: float, seed: int, scored: Texts) -> dict[str, Any]:
        rates = (head_rate, rate) if arm.kind != "none" else (rate, 0.0)
        result = one_run(arm, encoder, (training, scored), rates, seed, settings)
        print(f"{arm.title}: rate {rate:g}, seed {seed}: {result['correlation']:.2f}", flush=True)
        return result

    tried = {rate: run(rate, settings.search_seed, validation)["correlation"] for rate in arm.rates}
    best = max(tried, key=lambda rate: tried[rate])
    runs = [run(best, seed, test) for seed in settings.seeds]
    return {"title": arm.title, "rate": best, "validation": tried, "runs": runs}


def study(
    encoder: nn.Module, parts: Sequence[Texts], settings: Settings, workers: int
) -> dict[str, Any]:
    """Run every arm, each in a process of one thread; the head's rate is that of the head alone."""
    found = {"head": one_arm("head", encoder, parts, settings, 0.0)}
    others = [name for name in ARMS if name != "head"]
    # Whole arms share nothing, where threads within one would wait for each other.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(one_arm, name, encoder, parts, settings, found["head"]["rate"])
            for name in others
        ]
        return found | {name: job.result() for name, job in zip(others, jobs, strict=True)}


def mean_and_error(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Return the mean and its standard error, std(ddof=1) / √n, where there are several."""
    if len(values) < 2:
        return f"{values[0]:{sign}.{digits}f}" if values else "–"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def table(found: Mapping[str, Any]) -> str:
    """Return the arms as Markdown, with the paired differences from plain LoRA."""
    lines = [
        "| trained | parameters | rate | correlation | less LoRA's | right signs | mean s | "
        "max \\|s\\| |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, arm in found.items():
        runs = arm["runs"]
        values = [run["correlation"] for run in runs]
        base = [run["correlation"] for run in found["lora"]["runs"]]
        less = [a - b for a, b in zip(values, base, strict=True)]
        scales = [s for run in runs for s in run["scales"]]
        cells = [
            arm["title"],
            f"{runs[0]['num_trained']:,}",
            f"{arm['rate']:g}",
            mean_and_error(values),
            "–" if name == "lora" else mean_and_error(less, sign="+"),
            mean_and_error([run["sign"] for run in runs], 1),
            f"{statistics.fmean(scales):+.4f}" if scales else "–",
            f"{max(map(abs, scales)):.4f}" if scales else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seed_differences(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return the mean of ||s₁| − |s₂|| between seeds, between any matrices of them, and of |s|."""
    same, any_two = [], []
    for one, other in combinations(runs, 2):
        for row, a in enumerate(one["scales"]):
            for column, b in enumerate(other["scales"]):
                difference = abs(abs(a) - abs(b))
                any_two.append(difference)
                if row == column:
                    same.append(difference)
    sizes = [abs(s) for run in runs for s in run["scales"]]
    return statistics.fmean(same), statistics.fmean(any_two), statistics.fmean(sizes)


def report(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    found = results["arms"]
    settings = results["settings"]
    same, any_two, size = seed_differences(found["noise"]["runs"])
    head, noise = (
        [run["correlation"] for run in found[name]["runs"]] for name in ("head", "noise")
    )
    gain = mean_and_error([a - b for a, b in zip(noise, head, strict=True)], sign="+")
    return (
        f"{table(found)}\n\n"
        f"Mean of {len(settings['seeds'])} seeds ± one standard error; differences are paired by "
        f"seed. {settings['num_train']:,} texts for training, {settings['num_test']:,} for the "
        f"test. Parameters are without the head's. {results['date']}, {results['machine']}.\n\n"
        f"Noise over the head alone: {gain}. Its ||s₁| − |s₂|| is {same:.4f} between two seeds of "
        f"one matrix, {any_two:.4f} between two seeds of any two matrices; |s| is {size:.4f}.\n"
    )


def fetch_texts() -> Path:
    """Return vaderSentiment's sdist, fetched where the cache lacks it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outliermerge"
    target = cache / "sdists" / "vaderSentiment-3.3.1.tar.gz"
    if not target.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "--disable-pip-version-check"]
        command += ["--dest", str(target.parent), "vaderSentiment==3.3.1"]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("vaderSentiment 3.3.1, which has the texts, could not be fetched")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args()
    import peft
    import transformers

    from demo.fetch import fetch

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = fetch(options.models)["all-MiniLM-L6-v2"]
    settings = Settings()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    parts = split(read_texts(fetch_texts()), tokenizer, settings)
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    start = time.perf_counter()
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{options.workers} processes, {platform.machine()}",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "settings": asdict(settings),
        "arms": study(encoder, parts, settings, options.workers),
    }
    results["seconds"] = round(time.perf_counter() - start)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = TABLE.read_text().partition(MARKS[0])
    TABLE.write_text(before + MARKS[0] + report(results) + MARKS[1] + rest.partition(MARKS[1])[2])
    print(report(results))


if __name__ == "__main__":
    main()

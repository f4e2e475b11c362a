"""What training in fixed point does to accuracy: every recipe's tiny setting at O1 and in float32, over seeds.

``python benchmarks/recipes_accuracy.py`` runs what the JSON file lacks, each run in a process of its own, and goes on
where it was stopped. ``--page docs/accuracy.md`` writes the table into the page that says what came of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from report import describe, machine, save_json

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
OUTPUT = ROOT / "benchmarks" / "results" / "recipes_accuracy.json"
BASELINE, LEVEL = "O0", "O1"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"

# What the score of a recipe is, where it is not the share of classes.
SCORES = {
    "bert": "answers right",
    "crnn": "words right",
    "text": "next characters right",
    "translation": "sentences right",
    "yolov3": "mean average precision",
}

# yolov3 has settings of its own: shapes.yaml, and less of them.
YOLOV3 = ("model.width=0.125", "model.image_size=96", "data.train_images=800", "epochs=20", "evaluate_every=20")

Run = tuple[str, str, int]  # recipe, level and seed


def recipe_names() -> list[str]:
    """Returns the recipes, by name."""
    return sorted([*(file.stem for file in RECIPES.glob("*.yaml")), "yolov3"])


def settings_of(name: str) -> list[str]:
    """Returns what a recipe is trained with, as arguments of what trains it: its tiny settings, where it has some."""
    if name == "yolov3":
        return list(YOLOV3)
    from omegaconf import OmegaConf

    return ["--tiny"] if OmegaConf.load(RECIPES / f"{name}.yaml").get("tiny") else []


def fingerprint(name: str) -> str:
    """Returns a short name for what a recipe is trained with: rows of other settings are not taken for these."""
    from omegaconf import OmegaConf

    from cnmix.recipe import load_recipe

    settings: Any
    if name == "yolov3":
        settings = [OmegaConf.to_container(OmegaConf.load(RECIPES / "yolov3" / "shapes.yaml")), settings_of(name)]
    else:
        merged = OmegaConf.to_container(load_recipe(RECIPES / f"{name}.yaml", tiny="--tiny" in settings_of(name)))
        here = ("module", "output", "telemetry", "tiny")  # of this machine, or of no consequence
        settings = {key: value for key, value in dict(merged).items() if key not in here}  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def train(run: Run, threads: int, limit: float) -> dict[str, Any]:
    """Trains a recipe once, in a process of its own.

    Args:
        run: what.
        threads: of torch.
        limit: seconds that it may take.

    Returns:
        The row: recipe, level, seed, settings, score in [0, 1], seconds.

    Raises:
        RuntimeError: with the last lines of its output, if it failed or took too long.
    """
    name, level, seed = run
    settings = fingerprint(name)  # those that it begins with
    with tempfile.TemporaryDirectory() as folder:
        given = [*settings_of(name), f"threads={threads}", f"output={folder}", f"cnmix.opt_level={level}"]
        if name == "yolov3":
            plain = ["cnmix.rules=[]"] if level == BASELINE else []  # the baseline, which its rules are not for
            command = [str(RECIPES / "yolov3" / "train.py"), *given, *plain, f"seed={seed}"]
        else:
            command = ["-m", "cnmix", "train", str(RECIPES / f"{name}.yaml"), *given, f"seeds=[{seed}]"]
        try:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit, cwd=folder)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took more than {limit:.0f} s") from None
        if done.returncode:
            raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-5:]))
        found = json.loads(next(Path(folder).rglob("results.json")).read_text())
    result = found if name == "yolov3" else found[0]
    score = result["map" if name == "yolov3" else "test_accuracy"]
    return {
        "recipe": name,
        "level": level,
        "seed": seed,
        "settings": settings,
        "score": score,
        "seconds": round(result["seconds"], 1),
    }


def pairs(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Returns (float32, fixed point) of every seed that has both, by recipe, in percent."""
    scores = {(row["recipe"], row["level"], row["seed"]): 100 * row["score"] for row in rows}
    found: dict[str, list[tuple[float, float]]] = {}
    for name, level, seed in sorted(scores):
        if level == LEVEL and (name, BASELINE, seed) in scores:
            found.setdefault(name, []).append((scores[name, BASELINE, seed], scores[name, level, seed]))
    return found


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the table, and what it comes to over all recipes, in Markdown.

    Args:
        rows: as ``train`` returns them.
    """
    lines = [
        f"| recipe | score | seeds | float32 | {LEVEL} | change |",
        "|---|---|---|---|---|---|",
    ]
    means: dict[str, float] = {}
    single: list[float] = []
    for name, both in pairs(rows).items():
        changes = [fixed - plain for plain, fixed in both]
        means[name] = statistics.mean(changes)
        single += changes
        cells = [_spread([plain for plain, _ in both]), _spread([fixed for _, fixed in both]), _spread(changes, "+")]
        lines.append(f"| {name} | {SCORES.get(name, 'classes right')} | {len(both)} | {' | '.join(cells)} |")
    if means:
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        lines += [
            "",
            f"Over the {len(means)} recipes the change of the mean score is {statistics.mean(means.values()):+.2f} "
            f"points on average, from {means[least]:+.2f} ({least}) to {means[most]:+.2f} ({most}); of the "
            f"{len(single)} pairs of single runs, from {min(single):+.2f} to {max(single):+.2f}.",
        ]
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Returns mean, least and greatest."""
    mean, least, most = (format(value, f"{sign}.2f") for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} … {most})"


def write_page(page: Path, table: str) -> None:
    """Puts the table into a page, between its marks.

    Raises:
        ValueError: if the page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}, which the table stands between")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Runs what is missing; returns how many runs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=recipe_names(), default=recipe_names(), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each where several")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a run may take")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file, which runs are added to")
    parser.add_argument("--page", type=Path, help="put the table into this page, as docs/accuracy.md")
    args = parser.parse_args()
    found = machine()
    print(describe(found))
    rows = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    now = {name: fingerprint(name) for name in recipe_names()}
    rows = [row for row in rows if row["settings"] == now.get(row["recipe"])]
    known = {(row["recipe"], row["level"], row["seed"]) for row in rows}
    wanted = [(name, level, seed) for name in args.recipes for seed in args.seeds for level in (BASELINE, LEVEL)]
    failed = 0
    threads = 1 if args.processes > 1 else found["threads"]
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = {pool.submit(train, run, threads, args.limit): run for run in wanted if run not in known}
        for count, job in enumerate(as_completed(jobs), 1):
            name, level, seed = jobs[job]
            try:
                row = job.result()
            except RuntimeError as error:
                failed += 1
                print(f"{count} of {len(jobs)}: {name}, {level}, seed {seed} failed: {error}", flush=True)
                continue
            rows.append(row)
            rows.sort(key=lambda each: (each["recipe"], each["level"], each["seed"]))
            save_json(args.output, {"benchmark": "recipes_accuracy", "machine": found, "rows": rows})
            print(
                f"{count} of {len(jobs)}: {name}, {level}, seed {seed}: {row['score']:.2%}, {row['seconds']} s",
                flush=True,
            )
    # Also where nothing was run: rows of other settings are gone then, and the page has what the file has.
    save_json(args.output, {"benchmark": "recipes_accuracy", "machine": found, "rows": rows})
    table = markdown(rows)
    print(table)
    if args.page is not None:
        write_page(args.page, table)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))

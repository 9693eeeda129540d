# ruff: noqa: RUF001
"""Small repositories in the layouts and columns of the real data sets, made from sources.yaml's rows.

What is known of a set stands in LAYOUTS; a row of any other gets parquet files of its config. Texts
are words of the row's language, drawn by a seed, so that no two documents are alike.
"""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.recipe.tables import SourceRow

PACKED = (".parquet", ".gz", ".zst", ".jsonl")
FEW = 100_000
GROUPS = 12  # of rows, in a table
NUMBERED = "{split}-{n:05}-of-{of:05}.parquet"


@dataclass(frozen=True)
class Layout:
    """`path` of a file; `pattern` of a config's files in the card, where the card has configs."""

    path: str = "{config}/" + NUMBERED
    pattern: str | None = "{config}/{split}-*"
    columns: tuple[str, ...] = ("id", "url", "score")


WEB = ("id", "dump", "url", "date", "file_path", "language", "language_score")
IN_DATA = Layout("data/" + NUMBERED, "data/{split}-*", ("generation_model", "problem_source"))
BLOBS = ("repo_name", "path", "src_encoding", "length_bytes", "language", "license_type")
LAYOUTS = {
    "HuggingFaceFW/fineweb-edu": Layout(
        "data/CC-MAIN-2024-{n:02}/" + NUMBERED, "data/*/*", (*WEB, "token_count", "score")
    ),
    "mlfoundations/dclm-baseline-1.0": Layout(
        "global-shard_{n:02}_of_10/local-shard_{n}_of_10/shard_{n:08}_processed.jsonl.zst",
        None, ("url", "metadata", "language_id_whole_page_fasttext", "warcinfo"),
    ),
    "allenai/dolmino-mix-1124": Layout(
        "data/{config}/{config}-{n:04}.json.gz", "data/{config}/**/*",
        ("id", "added", "created", "metadata", "source"),
    ),
    "epfml/FineWeb2-HQ": Layout(
        "{config}/000_{n:05}.parquet", "{config}/*", (*WEB, "quality_score", "embeddings")
    ),
    "HuggingFaceFW/fineweb-2": Layout(
        "data/{config}/train/000_{n:05}.parquet", "data/{config}/train/*",
        (*WEB, "language_script", "minhash_cluster_size"),
    ),
    "LLM360/MegaMath": Layout("{config}/{n:04}.parquet", "{config}/**/*.parquet"),
    "nvidia/OpenMathInstruct-2": IN_DATA,
    "nvidia/OpenMathReasoning": IN_DATA,
    "bigcode/the-stack-v2-train-smol-ids": IN_DATA,
    "HuggingFaceTB/stack-edu": Layout(columns=(*BLOBS, "score", "int_score")),
    "facebook/natural_reasoning": Layout("full-{n}.jsonl", None, ("responses",)),
}  # fmt: skip
WORDS = {
    "eng": "the river a town of near and was old in its people who market found bridge by winter long their story",
    "fra": "la rivière une ville de près et était ancienne dans son peuple qui marché trouve pont par hiver long leur histoire",
    "spa": "el río una ciudad de cerca y era antigua en su pueblo que mercado encuentra puente por invierno largo historia ellos",
    "deu": "der Fluss eine Stadt von nahe und war alt in ihrem Volk das Markt findet Brücke durch Winter lange Geschichte wurde",
    "ita": "il fiume una città di vicino e era antica nel suo popolo che mercato trova ponte per inverno lungo storia loro",
    "por": "o rio uma cidade de perto e era antiga no seu povo que mercado encontra ponte por inverno longo história não",
    "rus": "река один город из рядом и был старый в его народ который рынок находит мост через зима долго история они",
    "cmn": "河流 一座 城市 的 附近 和 是 古老 在 它们 人民 市场 找到 桥梁 通过 冬天 漫长 他们 故事 了",
    "jpn": "川 ひとつの 町 の 近く と だった 古い には 人々 市場 見つける 橋 によって 冬 長い 彼らの 物語 です ました",
    "kor": "강은 하나의 도시 의 가까이 그리고 오래된 그것의 사람들 시장 찾는다 다리 으로 겨울 긴 그들의 이야기 있었다 에서 합니다",
    "arb": "النهر مدينة من قرب و كان قديم في شعبها الذي سوق يجد جسر خلال الشتاء طويل قصة هم إلى هذا",
    "fas": "رودخانه یک شهر از نزدیک و بود کهنه در مردم آن که بازار می‌یابد پل با زمستان بلند داستان آنها است",
    "hin": "नदी एक शहर के पास और था पुराना में उसके लोग जो बाज़ार पुल से सर्दी लंबी उनकी कहानी है",
    "tha": "แม่น้ำ เมือง ของ ใกล้ และ เป็น เก่า ใน ผู้คน ตลาด พบ สะพาน โดย ฤดูหนาว ยาว เรื่องราว พวกเขา ที่ ได้ ไม่",
    "vie": "con sông một thành phố của gần và là cổ trong người dân chợ tìm cầu qua mùa đông dài câu chuyện",
    "ell": "ο ποταμός μια πόλη από κοντά και ήταν παλιά στον λαό που αγορά βρίσκει γέφυρα χειμώνας μακρύς ιστορία τους δεν",
}  # fmt: skip
UNSPACED = ("cmn", "jpn", "tha")


def text_of(draw: random.Random, row: SourceRow) -> str:
    """A document of one to four kilobytes; of a code source, a program."""
    size = draw.randint(150, 600)
    if row.category == "code" and row.language not in (*WORDS, "Markdown"):
        return "\n".join(_line(draw) for _ in range(size // 8)) + "\n"
    words = draw.choices(WORDS.get(row.language, WORDS["eng"]).split(), k=size)
    every = 3 if row.category == "math" else 7
    words[::every] = map(str, draw.choices(range(10**6), k=-(-size // every)))
    space = "" if row.language in UNSPACED else " "
    sentences = [space.join(words[n : n + 15]).capitalize() for n in range(0, size, 15)]
    return ". ".join(sentences) + "."


def _line(draw: random.Random) -> str:
    names = draw.choices(("count", "total", "node", "value", "index", "buffer"), k=3)
    operator, number = draw.choice("+-*"), draw.randrange(10**5)
    return f"{names[0]}_{number} = {names[1]} {operator} {names[2]}({number % 97});"


def write_hub_sets(
    root: Path, rows: Mapping[str, SourceRow], text_bytes: Mapping[str, int] = {}, files: int = 3
) -> dict[str, Path]:
    """A folder for each repository that the rows name: {"datasets/<hub_id>": folder}.

    `text_bytes` of a source, FEW where none are named, in so many `files`. The contents of blob ids
    are in `<root>/contents/<blob id>`, packed as in Software Heritage's bucket.
    """
    cards: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        if row.same_as or not row.hub_id:
            continue
        layout, folder = LAYOUTS.get(row.hub_id, Layout()), root / row.hub_id.replace("/", "--")
        patterns = cards.setdefault(row.hub_id, {})
        if layout.pattern:
            place = {"config": _config(row), "split": row.split}
            patterns[f"{row.config}\n{row.split}"] = layout.pattern.format(**place)
        draw = random.Random(name)
        for place in _paths(row, layout, files):
            if not (folder / place).exists():  # several rows may read the same files
                size = text_bytes.get(name, FEW) // files
                made = _rows(draw, row, layout, size, root / "contents")
                if row.file_language:
                    made = _repositories(draw, rows, row, size, root / "contents")
                _write(folder / place, list(made))
    for hub_id, patterns in cards.items():
        (root / hub_id.replace("/", "--") / "README.md").write_text(_card(patterns), "utf-8")
    return {f"datasets/{hub_id}": root / hub_id.replace("/", "--") for hub_id in cards}


def _config(row: SourceRow) -> str:
    return "data" if row.config in (None, "default") else str(row.config)


def _paths(row: SourceRow, layout: Layout, files: int) -> Iterator[str]:
    """Where the source's files are, and one more where the row names only some of its config's."""
    place = {"config": _config(row), "split": row.split, "of": files}
    if row.data_files is None:
        yield from (layout.path.format(n=n, **place) for n in range(files))
        return
    patterns = [row.data_files] if isinstance(row.data_files, str) else row.data_files
    ending = layout.path[layout.path.rindex("}") + 1 :]
    for n in range(files):
        path = patterns[n % len(patterns)].replace("**/*", "**").replace("**", f"part-{n}/00000")
        path = path.replace("*", f"{n:05}")
        yield path if path.endswith(PACKED) else path + ending
    yield layout.path.format(n=files, **place)


def _rows(
    draw: random.Random, row: SourceRow, layout: Layout, size: int, contents: Path
) -> Iterator[dict[str, Any]]:
    while size > 0:
        text = text_of(draw, row)
        size -= len(text.encode())
        made = {column: _value(draw, column) for column in layout.columns}
        fields = [row.text_field] if isinstance(row.text_field, str) else row.text_field
        if row.contents:
            made |= _blob(text, contents)
        elif row.messages:
            turns = zip(("user", "assistant"), (text[::9], text), strict=True)
            made[fields[0]] = [{"role": role, "content": content} for role, content in turns]
        elif len(fields) == 1:
            made[fields[0]] = text
        else:  # a question and its answer
            made |= {field: f"{field} {text[n::2]}" for n, field in enumerate(fields)}
        yield made


def _repositories(
    draw: random.Random, rows: Mapping[str, SourceRow], row: SourceRow, size: int, contents: Path
) -> Iterator[dict[str, Any]]:
    """Rows of a set that lists repositories: each has a file of every language that is asked for."""
    named = [one.file_language for one in rows.values() if one.hub_id == row.hub_id]
    languages = {one if isinstance(one, str) else one[0] for one in named if one}
    while size > 0:
        files = [
            _blob(text_of(draw, row), contents) | {"language": one} for one in sorted(languages)
        ]
        size -= files[0]["length_bytes"]
        yield {"repo_name": _value(draw, "repo"), "files": files}


def _blob(text: str, contents: Path) -> dict[str, Any]:
    blob = hashlib.sha1(text.encode()).hexdigest()
    contents.mkdir(exist_ok=True, parents=True)
    (contents / blob).write_bytes(gzip.compress(text.encode(), mtime=0))
    return {"blob_id": blob, "src_encoding": "UTF-8", "length_bytes": len(text.encode())}


def _value(draw: random.Random, column: str) -> Any:
    if column in ("embeddings", "responses", "metadata"):
        numbers = [draw.random() for _ in range(4)]
        return numbers if column == "embeddings" else json.dumps(numbers)
    if column.endswith(("score", "count", "size", "bytes")):
        return draw.randrange(5)
    return f"{column}-{draw.randrange(10**9):x}"


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=-(-len(rows) // GROUPS))
        return
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if file.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif file.suffix == ".zst":
        from zstandard import ZstdCompressor

        content = ZstdCompressor().compress(content)
    file.write_bytes(content)


def _card(patterns: Mapping[str, str]) -> str:
    configs: dict[str, str] = {}
    for name, pattern in patterns.items():
        config, split = name.split("\n")
        entry = f'  - split: {split}\n    path: "{pattern}"\n'
        configs[config] = configs.get(config, f'- config_name: "{config}"\n  data_files:\n') + entry
    head = f"configs:\n{''.join(configs.values())}" if configs else "license: odc-by\n"
    return f"---\n{head}---\n# A set\n"

"""How files of a package become documents of a stand-in.

A reader takes (path, text) pairs and the options of its row and yields raw documents; cleaning,
dropping duplicates and the size cap are the same for all and are in corpus.py. Sizes are in
characters. Most documents are a few KB: the windows of the smallest scale are short, and a
held-out share or a slice of a stand-in needs many documents to be near its nominal size.
"""

import ast
import doctest
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from email import message_from_string

Files = Iterable[tuple[str, str]]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# A comment block at the head of a file, in the syntaxes of the languages we read.
_HEADER = re.compile(r"\A\s*(/\*.*?\*/|<!--.*?-->|(?:(?:#|//|--|;|%)[^\n]*\n)+)", re.DOTALL)


def pack(parts: Iterable[str], joiner: str, max_characters: int) -> Iterator[str]:
    """Join consecutive parts into documents of at most `max_characters`; cut what is longer."""
    held: list[str] = []
    size = 0
    for part in (piece for whole in parts for piece in _cut(whole, max_characters)):
        if held and size + len(part) > max_characters:
            yield joiner.join(held)
            held, size = [], 0
        held.append(part)
        size += len(part) + len(joiner)
    if held:
        yield joiner.join(held)


def _cut(text: str, max_characters: int) -> Iterator[str]:
    """The text in pieces, at the last line break, else space, before the limit."""
    while len(text) > max_characters:
        at = text.rfind("\n", 1, max_characters)
        if at < 0:
            at = text.rfind(" ", 1, max_characters)
        at = max_characters if at < 0 else at
        yield text[:at]
        text = text[at:].lstrip("\n")
    yield text


def whole_files(files: Files, max_characters: int = 8000) -> Iterator[str]:
    """A file is a document; a long one is split before unindented lines that follow a blank."""
    for _, text in files:
        text = text.replace("\r\n", "\n")
        header = _HEADER.match(text)
        if header and re.search(r"copyright|licen[sc]e|auto-?generated", header[0], re.IGNORECASE):
            text = text[header.end() :]
        yield from pack(re.split(r"\n\s*\n(?=\S)", text), "\n\n", max_characters)


def readmes(files: Files, max_characters: int = 4000) -> Iterator[str]:
    """Markdown files, and the long description that a package's METADATA holds after its fields."""
    for path, text in files:
        body = str(message_from_string(text).get_payload()) if path.endswith("METADATA") else text
        # Split before headings, as a Markdown page is read by section.
        yield from pack(re.split(r"\n(?=#{1,3} )", body), "\n", max_characters)


def jsonl_passages(files: Files, fields: list[str], max_characters: int = 8000) -> Iterator[str]:
    """The passages of a question-answering set, without its questions."""
    for _, text in files:
        for row in map(json.loads, text.splitlines()):
            passage = next(row[key] for key in fields if key in row)
            # PubMedQA numbers the sections of an abstract.
            passage = re.sub(r"^Context \(\d+\): ", "", passage, flags=re.MULTILINE)
            yield from pack(passage.split("\n"), "\n", max_characters)


def boolq_passages(files: Files) -> Iterator[str]:
    """BoolQ's training passages: without questions, and without any article of its dev set.

    `combined.jsonl` holds the dev rows too, under passages that start with `Title -- `. The whole
    article goes, because its other passages overlap the one that is asked about.
    """
    rows = {
        path.rpartition("/")[2]: list(map(json.loads, text.splitlines())) for path, text in files
    }
    dev = rows["dev.jsonl"]
    questions = {row["question"] for row in dev}
    titles = {row["title"] for row in dev}
    bodies = {row["passage"] for row in dev}
    # A passage asked about in dev may also serve a training question under the same text.
    bodies |= {_split_title(r)[1] for r in rows["combined.jsonl"] if r["question"] in questions}
    for row in rows["combined.jsonl"]:
        title, body = _split_title(row)
        if title not in titles and body not in bodies:
            yield row["passage"].replace(" -- ", "\n\n", 1)


def _split_title(row: dict[str, str]) -> tuple[str, str]:
    title, separator, body = row["passage"].partition(" -- ")
    return (title, body) if separator else ("", title)


def quac_dialogues(files: Files) -> Iterator[str]:
    """A passage, then the questions and answers of a conversation about it."""
    for _, text in files:
        for row in map(json.loads, text.splitlines()):
            questions = re.findall(r"^question\d+: (.*)$", row["question"], re.MULTILINE)
            answers = re.split(r"possible answers for question\d+:", row["answer"])[1:]
            turns = [
                f"Question: {question}\nAnswer: {_first_answer(answer.strip(), row['passage'])}"
                for question, answer in zip(questions, answers, strict=True)
            ]
            yield row["passage"].strip() + "\n\n" + "\n\n".join(turns)


def _first_answer(answers: str, passage: str) -> str:
    """The first of several annotators' spans, which the file joins without a clear separator.

    Spans are verbatim: the longest beginning that occurs in the passage is the first span.
    """
    if answers.startswith("CANNOTANSWER"):
        return "The passage does not say."
    # Being in the passage is monotone in the length of a beginning, so bisect.
    low, high = 0, len(answers)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if answers[:middle] in passage else (low, middle - 1)
    span = answers[:low]
    if low < len(answers):  # the next span may share its first letters with the passage
        span = span.rpartition(" ")[0] or span
    return span.strip(" ,") or "The passage does not say."


def message_catalogues(files: Files, max_characters: int = 2000) -> Iterator[str]:
    """Translated interface messages, consecutive ones joined into documents."""
    for path, text in files:
        yield from pack(
            _json_messages(text) if path.endswith(".json") else _po_messages(text),
            "\n",
            max_characters,
        )


def _json_messages(text: str) -> Iterator[str]:
    for source, translations in json.loads(text).items():
        # The empty key is the catalogue's header; untranslated messages repeat the English.
        if source and isinstance(translations, list):
            yield from (t.strip() for t in translations if t.strip() and t != source)


def _po_messages(text: str) -> Iterator[str]:
    for entry in text.split("\n\n")[1:]:  # the first entry is the catalogue's header
        if "#, fuzzy" in entry or "#~" in entry:
            continue  # guessed by a tool, or out of use
        for quoted in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', entry, re.MULTILINE):
            message = "".join(ast.literal_eval(line) for line in quoted.splitlines())
            if message.strip():
                yield message.strip()


def _definitions(files: Files) -> Iterator[tuple[str, str, list[Definition]]]:
    """(dotted module, source, functions and classes) of every file that this Python can parse."""
    for path, source in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        # Methods, yes; functions inside functions are already part of the outer one's source.
        inner = [node for top in tree.body if isinstance(top, ast.ClassDef) for node in top.body]
        nodes = [node for node in [*tree.body, *inner] if isinstance(node, Definition)]
        yield module, source, sorted(nodes, key=lambda node: node.lineno)


def docstrings(files: Files, max_characters: int = 4000) -> Iterator[str]:
    """The documentation of a module, one entry after the other, each under its dotted name."""
    for module, _, nodes in _definitions(files):
        texts = [(node.name, ast.get_docstring(node) or "") for node in nodes]
        entries = [f"{module}.{name}\n\n{text}" for name, text in texts if len(text) > 80]
        yield from pack(entries, "\n\n\n", max_characters)


def functions(files: Files, mentions: str = "", max_characters: int = 6000) -> Iterator[str]:
    """Source of functions (not classes) that match `mentions`; long ones are left out, not cut."""
    # Parsing is the slow part: leave out files that cannot match.
    matching = (file for file in files if re.search(mentions, file[1]))
    for module, source, nodes in _definitions(matching):
        lines = source.splitlines()
        blocks = []
        for node in nodes:
            block = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            fits = len(block) <= max_characters
            if fits and not isinstance(node, ast.ClassDef) and re.search(mentions, block):
                blocks.append(block)
        yield from (f"# {module}\n\n{text}" for text in pack(blocks, "\n\n\n", max_characters))


def instructions(files: Files, max_characters: int = 6000) -> Iterator[str]:
    """A task in words (the docstring), and the function that solves it."""
    for _, source, nodes in _definitions(files):
        lines = source.splitlines()
        for node in nodes:
            docstring = ast.get_docstring(node)
            if isinstance(node, ast.ClassDef) or not docstring or len(node.body) < 2:
                continue
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            # From the docstring's last line on: comments above the first statement belong to it.
            code = textwrap.dedent(
                "\n".join(head + lines[node.body[0].end_lineno : node.end_lineno])
            )
            text = f"Write this function:\n\n{docstring}\n\n```python\n{code}\n```"
            if len(text) <= max_characters:  # half an answer teaches nothing
                yield text


def _parsed_doctests(files: Files) -> Iterator[tuple[str, list[str | doctest.Example]]]:
    for module, _, nodes in _definitions(files):
        for node in nodes:
            try:
                parts = doctest.DocTestParser().parse(ast.get_docstring(node) or "")
            except ValueError:
                continue  # examples with inconsistent indentation
            if any(isinstance(part, doctest.Example) for part in parts):
                yield f"{module}.{node.name}", parts


def doctest_questions(files: Files, max_characters: int = 4000) -> Iterator[str]:
    """What does this expression give? The answer comes from the doctest."""
    for name, parts in _parsed_doctests(files):
        turns, setup = [f"About {name}."], ""
        for part in parts:
            if isinstance(part, str):
                continue
            if not part.want:
                setup += part.source
                continue
            given = f"Given\n\n{setup}\n" if setup else ""
            turns.append(f"Question: {given}What is\n\n{part.source}\nAnswer: {part.want}")
            setup = ""
        if len(turns) > 1:
            yield from pack(turns, "\n", max_characters)


def doctest_scripts(files: Files, max_characters: int = 6000) -> Iterator[str]:
    """A docstring as an exported notebook: prose as comments, cells as code, output below."""
    for name, parts in _parsed_doctests(files):
        cells = [f"# {name}"]
        for part in parts:
            if isinstance(part, str):
                cells.append("".join(f"# {line}\n" for line in part.strip().splitlines() if line))
            else:
                output = "".join(f"# > {line}\n" for line in part.want.splitlines())
                cells.append(part.source + output)
        yield from pack((cell for cell in cells if cell), "\n", max_characters)


READERS: dict[str, Callable[..., Iterator[str]]] = {
    reader.__name__: reader
    for reader in (
        *(whole_files, readmes, message_catalogues),
        *(jsonl_passages, boolq_passages, quac_dialogues),  # question-answering sets
        *(docstrings, functions, instructions, doctest_questions, doctest_scripts),  # Python
    )
}
